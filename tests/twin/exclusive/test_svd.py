"""Truncated SVDs against numpy's, whichever way they are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging import linear_algebra
from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.twin.exclusive import exclusive_vector


def best(matrix: Tensor, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
@pytest.mark.parametrize("true_rank", [0, 1, 5, 40])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_it_is_the_best_approximation(shape: tuple[int, int], true_rank: int, rank: int) -> None:
    torch.manual_seed(true_rank)
    matrix = torch.randn(shape[0], true_rank) @ torch.randn(true_rank, shape[1])
    B, A = truncated_svd(matrix, rank)
    assert A.shape[0] == min(rank, true_rank)
    expected = best(matrix, rank)
    assert np.linalg.norm((B @ A).numpy() - expected) <= 1e-5 * max(1.0, np.linalg.norm(expected))


def test_a_lora_experts_difference_needs_no_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of full weights in float32: their rounding lies on the difference, which has a rank of 8 otherwise."""
    torch.manual_seed(0)
    base = 0.05 * torch.randn(300, 200)
    expert = base + 0.002 * torch.randn(300, 8) @ torch.randn(8, 200)
    monkeypatch.setattr(linear_algebra, "FULL_SVD_COLUMNS", 0)
    monkeypatch.setattr(torch, "svd_lowrank", lambda *_, **__: pytest.fail("not recognised"))
    for rank, kept in ((4, 4), (8, 8), (20, 8)):
        B, A = truncated_svd(expert - base, rank)
        assert A.shape[0] == kept
        expected = best(expert - base, rank)
        assert np.linalg.norm((B @ A).numpy() - expected) <= 1e-4 * np.linalg.norm(expected)


def test_a_lora_experts_difference_from_a_merge_is_exact_above_1024_columns() -> None:
    """Of eight experts of rank 16, whose difference from their merge has rank 128."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(1280, 128)).Q for _ in range(2))
    matrix = U * torch.arange(1, 129).float().rsqrt() @ V.T
    B, A = truncated_svd(matrix, 32)
    least = torch.arange(33, 129).float().reciprocal().sum().sqrt()
    assert torch.linalg.norm(matrix - B @ A).item() == pytest.approx(least.item(), rel=1e-4)


def test_large_matrices_are_close_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_algebra, "FULL_SVD_COLUMNS", 0)
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 120)).Q for size in (300, 200))
    matrix = U * torch.arange(1, 121).float().rsqrt() @ V.T
    B, A = truncated_svd(matrix, 10)
    error = torch.linalg.norm(matrix - B @ A)
    assert error <= 1.01 * np.linalg.norm(matrix.numpy() - best(matrix, 10))


@pytest.mark.parametrize(("shape", "full"), [((1100, 1024), True), ((1025, 1100), False)])
def test_up_to_1024_columns_are_decomposed_whole(
    shape: tuple[int, int], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Gram matrix of 2048 columns took 25 times as long an entry as a sketch: 473 ns against 18 ns at rank 8."""
    sketched: list[int] = []
    sketch = torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank", lambda *a, **named: sketched.append(named["q"]) or sketch(*a, **named))
    truncated_svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 8)
    assert sketched == ([] if full else [24])


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (60, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weak_directions_are_as_exact_as_the_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Singular values from 1 to 1e-4, one by one: what a Gram matrix in float32 would blur."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 60, dtype=torch.float64)).Q for size in shape)
    values = torch.logspace(0, -4, 60, dtype=torch.float64)
    B, A = truncated_svd((U * values @ V.T).to(dtype), 50)
    assert B.dtype == A.dtype == dtype
    error = torch.finfo(dtype).eps * 60
    torch.testing.assert_close(B.double().T @ B.double(), torch.diag(values[:50]), rtol=0, atol=error)
    torch.testing.assert_close(A.double() @ A.double().T, torch.diag(values[:50]), rtol=0, atol=error)
    torch.testing.assert_close(
        A.norm(dim=1).double(), values[:50].sqrt(), rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=0
    )
    assert (B @ A - (U[:, :50] * values[:50] @ V[:, :50].T).to(dtype)).norm() < 10 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(60, 40), (700, 600)])
def test_live_parameters_are_read_as_their_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = truncated_svd(matrix, 3)
    for found, plain in zip(truncated_svd(matrix.clone().requires_grad_(), 3), expected, strict=True):
        assert torch.equal(found, plain)
        assert not found.requires_grad


def test_a_difference_that_is_not_finite_names_its_tensor() -> None:
    shared = {"layer.weight": torch.zeros(8, 8)}
    with pytest.raises(InputError, match=r"tensor layer\.weight"):
        exclusive_vector({"layer.weight": torch.full((8, 8), torch.nan)}, shared, rank=2)
