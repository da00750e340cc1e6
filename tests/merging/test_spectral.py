"""The SVD that ends where rounding begins, and what happens where LAPACK gives up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

import twin_bench
from tests.support.matrices import MATRICES, random_experts
from twin_bench import InputError
from twin_bench.merging import linear_algebra as singular
from twin_bench.merging.spectral import polar, rounding, svd

SPECTRAL = ("tsv_m", "iso_c", "iso_cts", "knots", "wudi")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MATRICES)
def test_the_rank_of_a_lora_experts_delta_is_found_under_rounding(name: str, seed: int) -> None:
    """theta_t is stored in float32 beside a theta_0 that is fifty times larger than the delta's smallest part."""
    base, experts = random_experts(1, rank=3, seed=seed, size=1e-3)
    tau = experts["task0"][name] - base[name]
    U, S, V = svd(tau, name, above=rounding(base[name], tau[None]))
    assert len(torch.linalg.svdvals(tau).nonzero()) > len(S) == 3
    torch.testing.assert_close((U * S) @ V.T, tau.to(U), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_a_direction_that_a_sketch_leaves_out_is_found(shape: tuple[int, int]) -> None:
    """A sketch finds 18 directions; 20 more are a hundred thousand times smaller, and above what counts as rounding."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 38, dtype=torch.float64, generator=generator)).Q for size in shape)
    spectrum = torch.tensor([1.0] * 18 + [1e-5] * 20, dtype=torch.float64)
    matrix = ((U * spectrum) @ V.T).float()
    found = svd(matrix, "w", above=4e-6)[1]
    torch.testing.assert_close(found.double(), spectrum, rtol=0.05, atol=0)
    assert len(svd(matrix, "w", above=1e-3)[1]) == 18


def test_low_ranks_are_in_float64_and_hold_no_more_than_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(60, 40, generator=generator)
    low = full[:, :3] @ full[:3]
    for factor in svd(low, "w", above=1e-4):
        assert factor.dtype is torch.float64
        assert factor.ndim == 1 or factor.untyped_storage().nbytes() == 8 * factor.numel()
    U, S, V = svd(full, "w", above=1e-4, most=5)
    assert {U.dtype, S.dtype, V.dtype} == {torch.float32}
    _, expected, Vh = np.linalg.svd(full.numpy())
    torch.testing.assert_close(S, torch.from_numpy(expected[:5]))
    torch.testing.assert_close((U * S) @ V.T, full @ torch.from_numpy(Vh[:5].T @ Vh[:5]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tsv_m", "iso_cts"])
@pytest.mark.parametrize("noise", [1e-6, 1e-5, 3e-5])
def test_experts_that_are_nearly_equal(method: str, noise: float) -> None:
    """The left vectors' directions can be told apart where the right ones' can't: one is of low rank, one is not."""
    generator = torch.Generator().manual_seed(0)
    base, common = (torch.randn(1000, 64, generator=generator) for _ in range(2))
    moves = [common + noise * torch.randn(common.shape, generator=generator) for _ in range(5)]
    experts = {f"task{index}": {"w": base + move} for index, move in enumerate(moves)}
    found = twin_bench.merge(method, {"w": base}, experts)["w"]
    assert found.dtype is torch.float32
    assert found.isfinite().all()


def test_polar_is_scipys() -> None:
    columns = torch.randn(19, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, _ = scipy.linalg.polar(columns.numpy())
    torch.testing.assert_close(polar(columns, "w"), torch.from_numpy(expected))


def test_polar_of_columns_that_coincide_adds_no_direction() -> None:
    axes = torch.eye(5, dtype=torch.float64)[:, :2]
    expected = torch.cat([axes, axes], dim=1) / 2**0.5
    torch.testing.assert_close(polar(torch.cat([axes, axes], dim=1), "w"), expected)


def refuse(error: type[Exception]) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error("did not converge")

    return fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("large", [1, 1024])
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "knots"])
def test_another_driver_takes_over_and_a_last_failure_names_the_tensor(
    method: str, large: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of float32 matrices scipy or torch finds eigenvectors, of float64 ones torch the SVD."""
    monkeypatch.setattr(singular, "LARGE", large)
    first, second = (scipy.linalg, torch.linalg) if large == 1 else (torch.linalg, scipy.linalg)
    base, experts = random_experts(2, dtype=dtype)
    expected = twin_bench.merge(method, base, experts)
    for module, function in ((first, "eigh"), (torch.linalg, "svd")):
        monkeypatch.setattr(module, function, refuse(torch.linalg.LinAlgError))
    for name, found in twin_bench.merge(method, base, experts).items():
        torch.testing.assert_close(found, expected[name])
    for module, function in ((second, "eigh"), (scipy.linalg, "svd")):
        monkeypatch.setattr(module, function, refuse(np.linalg.LinAlgError))
    with pytest.raises(InputError, match="tensor tall: the SVD of its task vectors does not converge; merge with"):
        twin_bench.merge(method, base, experts)


@pytest.mark.parametrize("method", SPECTRAL)
def test_what_no_expert_changed_is_not_decomposed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = random_experts(1)
    for function in ("svd", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, function, refuse(AssertionError))
        monkeypatch.setattr(scipy.linalg, function, refuse(AssertionError))
    merged = twin_bench.merge(method, base, {"a": base, "b": base})
    assert all(torch.equal(merged[name], base[name]) for name in base)


@pytest.mark.parametrize("method", SPECTRAL)
def test_an_expert_that_left_a_matrix_alone_is_no_obstacle(method: str) -> None:
    base, experts = random_experts(3)
    experts["task1"] = {**experts["task1"], "tall": base["tall"]}
    assert all(found.isfinite().all() for found in twin_bench.merge(method, base, experts).values())


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi"])
def test_tensors_that_are_no_matrices_take_the_mean(method: str) -> None:
    base, experts = random_experts(3)
    merged = twin_bench.merge(method, base, experts, scaling=0.7)
    for name in ("vector", "kernel"):
        mean = sum(expert[name] for expert in experts.values()) / 3
        torch.testing.assert_close(merged[name], base[name] + 0.7 * (mean - base[name]))


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_experts_that_cancel_leave_the_base(method: str) -> None:
    base, experts = random_experts(1, dtype=torch.float64)
    opposite = {name: 2 * base[name] - tensor for name, tensor in experts["task0"].items()}
    merged = twin_bench.merge(method, base, {**experts, "opposite": opposite})
    for name in MATRICES:
        torch.testing.assert_close(merged[name], base[name])
