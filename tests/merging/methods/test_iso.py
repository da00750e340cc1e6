"""Iso-C and Iso-CTS against their papers' formulas: eigenvectors and projections instead of SVDs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import MATRICES, assert_moved, deltas, random_experts
from twin_bench import InputError
from twin_bench.merging.methods.iso_cts import project_out


def orthogonal_factor(matrix: np.ndarray) -> np.ndarray:
    """U V^T of an (m, n) matrix of any rank, by Newton's iteration on its polar factor within its own row space."""
    squares, rows = np.linalg.eigh(matrix.T @ matrix)
    rows = rows[:, squares > 1e-9 * squares.max()]
    factor = matrix @ rows @ np.linalg.cholesky(np.linalg.inv(rows.T @ matrix.T @ matrix @ rows))
    core = np.linalg.inv(factor.T @ factor) @ factor.T @ matrix @ rows
    for _ in range(60):
        core = (core + np.linalg.inv(core).T) / 2
    return factor @ core @ rows.T


def nuclear_norm(matrix: np.ndarray) -> float:
    return float(np.trace(orthogonal_factor(matrix).T @ matrix))


def iso_cts(taus: list[np.ndarray], rank: int, fraction: float) -> np.ndarray:
    total, tasks = sum(taus), len(taus)
    own = min(round((rank - int(rank * fraction)) / tasks), int(rank / tasks))
    shared = rank - tasks * own

    def leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        squares, rows = np.linalg.eigh(matrix.T @ matrix)
        rows = rows[:, np.argsort(-squares)[:count]]
        lengths = np.linalg.norm(matrix @ rows, axis=0)
        return matrix @ rows / lengths, lengths, rows

    left, lengths, right = leading(total, shared)
    outside = np.eye(len(total)) - left @ left.T
    parts = [(left, lengths, right), *(leading(outside @ tau, own) for tau in taus)]
    U, S, V = (np.concatenate(factors, axis=-1) for factors in zip(*parts, strict=True))
    return S.mean() * orthogonal_factor(U) @ orthogonal_factor(V).T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "seed"), [(1, 0), (3, 1), (5, 2)])
def test_iso_c_is_the_papers_formula(count: int, seed: int, dtype: torch.dtype) -> None:
    base, experts = random_experts(count, dtype=dtype, seed=seed)
    merged = twin_bench.merge("iso_c", base, experts, scaling=1.3)
    for name in MATRICES:
        total = sum(deltas(base, experts, name))
        expected = 1.3 * nuclear_norm(total) / min(total.shape) * orthogonal_factor(total)
        assert_moved(merged[name], base[name], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_iso_c_flattens_the_rank_that_lora_experts_have(dtype: torch.dtype) -> None:
    base, experts = random_experts(3, rank=2, dtype=dtype)
    merged = twin_bench.merge("iso_c", base, experts)
    for name in MATRICES:
        total = sum(deltas(base, experts, name))
        assert_moved(merged[name], base[name], nuclear_norm(total) / 6 * orthogonal_factor(total))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "fraction"), [(1, 0.6), (2, 0.8), (3, 0.5), (4, 0.2), (7, 0.01)])
def test_iso_cts_is_the_papers_formula(count: int, fraction: float, dtype: torch.dtype) -> None:
    """The last case leaves 11 directions to 7 tasks: round(11 / 7) = 2 each would be more than there are."""
    base, experts = random_experts(count, dtype=dtype, seed=count)
    merged = twin_bench.merge("iso_cts", base, experts, scaling=0.9, common_space_fraction=fraction)
    for name in MATRICES:
        taus = deltas(base, experts, name)
        assert_moved(merged[name], base[name], 0.9 * iso_cts(taus, min(taus[0].shape), fraction))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_iso_cts_divides_the_rank_that_lora_experts_have(dtype: torch.dtype) -> None:
    """Tasks' directions that nearly coincide strengthen the rounding of what is left of float32 task vectors."""
    base, experts = random_experts(3, rank=3, dtype=dtype)
    merged = twin_bench.merge("iso_cts", base, experts, common_space_fraction=0.5)
    for name in MATRICES:
        assert_moved(merged[name], base[name], iso_cts(deltas(base, experts, name), 9, 0.5), loosened=2)


def test_iso_cts_without_room_for_tasks_is_iso_c() -> None:
    base, experts = random_experts(4)
    whole = twin_bench.merge("iso_cts", base, experts, common_space_fraction=1.0)
    for name, found in twin_bench.merge("iso_c", base, experts).items():
        torch.testing.assert_close(whole[name], found)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_the_spectrum_is_flat_and_scales(method: str) -> None:
    base, experts = random_experts(3, dtype=torch.float64)
    once, twice = (twin_bench.merge(method, base, experts, scaling=scaling) for scaling in (1.0, 2.0))
    for name in MATRICES:
        values = torch.linalg.svdvals(once[name] - base[name])
        torch.testing.assert_close(values, values[:1].expand_as(values))
        torch.testing.assert_close(twice[name] - base[name], 2 * (once[name] - base[name]))


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.1])
def test_iso_cts_refuses_a_fraction_out_of_range(fraction: float) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=r"iso_cts: common_space_fraction must be in \(0, 1\]"):
        twin_bench.merge("iso_cts", base, experts, common_space_fraction=fraction)


def test_what_lies_beyond_the_common_space_is_found_under_float32s_rounding() -> None:
    """A task vector nearly all of which is common: what is left is a difference of numbers a million times larger."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(40, 6, generator=generator)).Q
    tau = U @ torch.randn(6, 30, generator=generator) + 1e-6 * torch.randn(40, 30, generator=generator)
    expected = tau.double() - U.double() @ (U.double().T @ tau.double())
    project_out(U, tau)
    torch.testing.assert_close(tau.double(), expected, rtol=1e-6, atol=0)
