"""FR-Merging against its formula with explicit Fourier matrices, expert by expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import MATRICES, SHAPES, assert_moved, deltas, random_experts
from twin_bench import InputError


def waves(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the Fourier matrix of a length, and how many periods each of its rows has, with a sign."""
    index = np.arange(length)
    periods = np.where(index <= length // 2, index, index - length)
    return np.exp(-2j * np.pi * np.outer(periods, index) / length), periods


def filtered(tau: np.ndarray, cutoff: float) -> np.ndarray:
    down, p = waves(tau.shape[0])
    across, q = waves(tau.shape[1])
    spectrum = down @ tau @ across.T
    kept = np.where(np.sqrt(p[:, None] ** 2 + q**2) < cutoff * min(tau.shape), 0, spectrum)
    return (down.conj().T @ kept @ across.conj() / tau.size).real


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cutoff", [0.03, 0.1, 0.45])
@pytest.mark.parametrize("rank", [None, 2])
def test_is_the_papers_formula(rank: int | None, cutoff: float, dtype: torch.dtype) -> None:
    base, experts = random_experts(3, rank=rank, dtype=dtype)
    merged = twin_bench.merge("free", base, experts, cutoff=cutoff, scaling=0.7)
    for name in MATRICES:
        taus = deltas(base, experts, name)
        assert_moved(merged[name], base[name], 0.7 * sum(filtered(tau, cutoff) for tau in taus))


def test_what_is_constant_is_removed_and_what_alternates_is_kept() -> None:
    base = {"w": torch.zeros(8, 8)}
    checks = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    found = twin_bench.merge("free", base, {"a": {"w": 5 + checks}}, scaling=1.0, cutoff=0.2)["w"]
    torch.testing.assert_close(found, checks)


def test_without_a_cutoff_it_is_task_arithmetic() -> None:
    base, experts = random_experts(3)
    plain = twin_bench.merge("task_arithmetic", base, experts)
    filtered_merge = twin_bench.merge("free", base, experts)
    for name, found in twin_bench.merge("free", base, experts, cutoff=0.0).items():
        assert torch.equal(found, plain[name])
    for name in SHAPES.keys() - set(MATRICES):
        assert torch.equal(filtered_merge[name], plain[name])


@pytest.mark.parametrize("cutoff", [-0.1, 1.0])
def test_refuses_a_cutoff_out_of_range(cutoff: float) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=r"free: cutoff must be in \[0, 1\), not"):
        twin_bench.merge("free", base, experts, cutoff=cutoff)
