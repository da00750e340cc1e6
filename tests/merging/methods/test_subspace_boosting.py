"""Subspace Boosting against its formula in numpy, on top of merges that are computed apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import MATRICES, SHAPES, assert_moved, deltas, random_experts
from tests.support.merges import EXPERTS, models
from twin_bench import InputError
from twin_bench.merging.registry import find_method

INNER = sorted(n for n, m in twin_bench.methods().items() if m.track == "data-free" and "merge" not in m.defaults)


def boosted(tau: np.ndarray, threshold: float, rank: int = 99) -> np.ndarray:
    U, S, Vh = np.linalg.svd(tau, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    cut = next(k for k in range(len(S)) if S[: k + 1].sum() >= threshold * S.sum() - 1e-9)
    return sum(max(s, S[cut]) * np.outer(u, v) for s, u, v in zip(S, U.T, Vh, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.8, 1.0])
def test_is_the_papers_formula(threshold: float, dtype: torch.dtype) -> None:
    base, experts = random_experts(3, dtype=dtype)
    merged = twin_bench.merge("subspace_boosting", base, experts, threshold=threshold, scaling=0.4)
    for name in MATRICES:
        assert_moved(merged[name], base[name], boosted(0.4 * sum(deltas(base, experts, name)), threshold))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_that_no_lora_expert_has_are_not_lifted(dtype: torch.dtype) -> None:
    base, experts = random_experts(2, rank=2, dtype=dtype)
    merged = twin_bench.merge("subspace_boosting", base, experts, threshold=0.5)
    for name in MATRICES:
        assert_moved(merged[name], base[name], boosted(0.3 * sum(deltas(base, experts, name)), 0.5, rank=4))


@pytest.mark.parametrize("name", INNER)
def test_any_data_free_merge_can_be_boosted(name: str) -> None:
    base, tuned = models(experts=EXPERTS[name])
    plain = twin_bench.merge(name, base, tuned)
    lifted = twin_bench.merge("subspace_boosting", base, tuned, merge=name, threshold=0.5)
    for tensor in ("tall", "wide", "square"):
        tau = (plain[tensor] - base[tensor]).double().numpy()
        rank = np.linalg.matrix_rank(tau, tol=1e-4)
        found = lifted[tensor].double().numpy() - base[tensor].double().numpy()
        assert np.linalg.norm(found - boosted(tau, 0.5, rank)) <= 2e-3 * np.linalg.norm(tau)
    assert torch.equal(lifted["vector"], plain["vector"])


def test_at_the_full_sum_it_is_the_merge_itself() -> None:
    base, experts = random_experts(2)
    plain = twin_bench.merge("ties", base, experts)
    found = twin_bench.merge("subspace_boosting", base, experts, merge="ties", threshold=1.0)
    for name in SHAPES:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-5)


def test_it_is_tuned_as_the_merge_that_it_lifts() -> None:
    header = find_method("subspace_boosting")
    assert header.given({"merge": "tsv_m"}).tune == find_method("tsv_m").tune != {}
    assert header.given({"merge": "average"}).tune == {}


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_refuses_a_threshold_out_of_range(threshold: float) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=r"subspace_boosting: threshold must be in \(0, 1\]"):
        twin_bench.merge("subspace_boosting", base, experts, threshold=threshold)
