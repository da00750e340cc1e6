"""ACE-Merging against its formula in numpy, with explicit inverses, as its authors' code computes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import MATRICES, SHAPES, assert_moved, deltas, random_experts
from twin_bench import InputError
from twin_bench.merging.methods.ace import gamma


def ace(taus: list[np.ndarray], eps: float = 1e-2, rank: int = 99) -> np.ndarray:
    """Return the merged delta. `rank` is that of all experts together."""
    tasks, inputs = len(taus), taus[0].shape[1]
    traces = np.array([np.trace(tau.T @ tau) for tau in taus])
    logs = np.log(traces)
    apart = tasks > 1 and np.var(logs, ddof=1) / np.mean(logs) ** 2 > 0.3
    centred = [tau - tau.mean(axis=0, keepdims=True) for tau in taus]
    grams = [w.T @ w for w in centred]
    scales = [1 / np.trace(g) if apart else 1.0 for g in grams]
    plain = [g * scale for g, scale in zip(grams, scales, strict=True)]
    ridged = [s + eps * scale * np.eye(inputs) for s, scale in zip(plain, scales, strict=True)]
    prior = np.outer(np.ones(inputs), np.mean(sum(plain), axis=0)) / (traces.mean() if apart else 1)
    merged = sum(w @ p for w, p in zip(centred, ridged, strict=True)) @ np.linalg.inv(sum(ridged) + prior)
    if not apart:
        return merged
    residual = sum(w @ (s - sum(ridged) / tasks) for w, s in zip(centred, plain, strict=True))
    U, S, Vh = np.linalg.svd(merged + residual, full_matrices=False)
    kept = min(rank, int(len(S) * 0.3))
    return merged + np.mean(S[:kept]) * U[:, :kept] @ Vh[:kept]


def of_unequal_size(
    count: int, **options: object
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Experts whose task vectors grow a hundredfold from one to the next, so that they count as heterogeneous."""
    base, experts = random_experts(count, dtype=torch.float64, **options)  # type: ignore[arg-type]
    for index, expert in enumerate(experts.values()):
        for name, tensor in expert.items():
            expert[name] = base[name] + 100.0 ** (index - count // 2) * (tensor - base[name])
    return base, experts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "rank", "seed"), [(2, None, 0), (4, None, 1), (3, 2, 2), (1, None, 3)])
def test_is_the_authors_formula(count: int, rank: int | None, seed: int, dtype: torch.dtype) -> None:
    base, experts = random_experts(count, rank=rank, dtype=dtype, seed=seed)
    merged = twin_bench.merge("ace", base, experts, scaling=0.8)
    for name in MATRICES:
        assert_moved(merged[name], base[name], 0.8 * ace(deltas(base, experts, name)))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_heterogeneous_experts_are_normalised_and_refined(count: int) -> None:
    base, experts = of_unequal_size(count, seed=count)
    merged = twin_bench.merge("ace", base, experts)
    for name in MATRICES:
        taus = deltas(base, experts, name)
        assert gamma(torch.tensor([np.sum(tau**2) for tau in taus])) > 0.3
        assert_moved(merged[name], base[name], ace(taus), loosened=1e2)


def test_the_refinement_of_lora_experts_has_no_more_than_their_rank() -> None:
    base, experts = of_unequal_size(2, rank=1)
    merged = twin_bench.merge("ace", base, experts)
    for name in MATRICES:
        assert_moved(merged[name], base[name], ace(deltas(base, experts, name), rank=2), loosened=1e2)


def test_other_tensors_take_the_mean() -> None:
    base, experts = random_experts(3)
    merged = twin_bench.merge("ace", base, experts)
    for name in SHAPES.keys() - set(MATRICES):
        torch.testing.assert_close(merged[name], torch.stack([expert[name] for expert in experts.values()]).mean(dim=0))


def test_an_expert_that_left_a_matrix_alone_adds_no_term() -> None:
    base, experts = random_experts(2, dtype=torch.float64)
    with_idle = twin_bench.merge("ace", base, {**experts, "idle": base})
    without = twin_bench.merge("ace", base, experts)
    for name in MATRICES:
        torch.testing.assert_close(with_idle[name], without[name])


def test_rows_that_are_all_equal_have_no_covariance() -> None:
    base = {"w": torch.zeros(3, 5)}
    experts = {"a": {"w": torch.ones(3, 5)}, "b": {"w": torch.arange(5.0).expand(3, 5)}}
    assert torch.equal(twin_bench.merge("ace", base, experts)["w"], base["w"])


@pytest.mark.parametrize(("option", "value"), [("ridge", 0.0), ("ridge", -1.0), ("fraction", 0.0), ("fraction", 2.0)])
def test_refuses_options_out_of_range(option: str, value: float) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=f"ace: {option} must be"):
        twin_bench.merge("ace", base, experts, **{option: value})
