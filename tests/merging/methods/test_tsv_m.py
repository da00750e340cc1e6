"""TSV-M against the paper's formula in numpy, with Procrustes as X (X^T X)^(-1/2) instead of an SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import MATRICES, assert_moved, deltas, random_experts


def whitened(columns: np.ndarray) -> np.ndarray:
    """X (X^T X)^(-1/2), the inverse root being a pseudo-inverse where columns depend on one another."""
    squares, axes = np.linalg.eigh(columns.T @ columns)
    inverse = np.array([1 / np.sqrt(square) if square > 1e-9 else 0.0 for square in squares])
    return columns @ axes @ np.diag(inverse) @ axes.T


def tsv_merge(taus: list[np.ndarray], rank: int) -> np.ndarray:
    left, right, spectrum = [], [], []
    for tau in taus:
        U, S, Vh = np.linalg.svd(tau)
        for index in range(min(rank, min(tau.shape) // len(taus))):
            left.append(U[:, index])
            spectrum.append(S[index])
            right.append(Vh[index])
    U, V = whitened(np.stack(left, axis=1)), whitened(np.stack(right, axis=1))
    return sum(s * np.outer(u, v) for s, u, v in zip(spectrum, U.T, V.T, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "seed"), [(2, 0), (3, 1), (5, 2)])
def test_is_the_papers_formula(count: int, seed: int, dtype: torch.dtype) -> None:
    base, experts = random_experts(count, dtype=dtype, seed=seed)
    merged = twin_bench.merge("tsv_m", base, experts, scaling=0.8)
    for name in MATRICES:
        assert_moved(merged[name], base[name], 0.8 * tsv_merge(deltas(base, experts, name), rank=99))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lora_experts_orthogonalise_the_directions_they_have(dtype: torch.dtype) -> None:
    """Rank 2 where each task has room for 3 and more: the vectors of singular values of zero take no part."""
    base, experts = random_experts(3, rank=2, dtype=dtype)
    merged = twin_bench.merge("tsv_m", base, experts)
    for name in MATRICES:
        assert_moved(merged[name], base[name], tsv_merge(deltas(base, experts, name), rank=2))


def test_one_expert_comes_back() -> None:
    base, experts = random_experts(1)
    for name, found in twin_bench.merge("tsv_m", base, experts).items():
        torch.testing.assert_close(found, experts["task0"][name])


def test_equal_experts_of_a_rank_that_has_room_come_back() -> None:
    base, experts = random_experts(1, rank=3)
    for name, found in twin_bench.merge("tsv_m", base, dict.fromkeys("abc", experts["task0"])).items():
        torch.testing.assert_close(found, experts["task0"][name], rtol=1e-4, atol=1e-5)


def test_a_matrix_too_thin_to_share_stays_the_bases() -> None:
    base, experts = random_experts(12)
    merged = twin_bench.merge("tsv_m", base, experts)
    assert torch.equal(merged["wide"], base["wide"])
    assert not torch.equal(merged["tall"], base["tall"])
