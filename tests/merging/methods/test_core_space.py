"""Core Space against its authors' recipe in numpy: bases of the stacked factors, cores, a merge, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import MATRICES, assert_moved, deltas, random_experts, ties_by_loops
from tests.support.merges import EXPERTS, models
from twin_bench import InputError

INNER = sorted(n for n, m in twin_bench.methods().items() if m.track == "data-free" and "merge" not in m.defaults)


def cores(taus: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Return U, the core matrices and V^T, of the factors B = U S and A = S V^T of each task's own SVD."""
    left, right = [], []
    for tau in taus:
        U, S, Vh = np.linalg.svd(tau, full_matrices=False)
        left.append((U * S)[:, S > 1e-9])
        right.append((S[:, None] * Vh)[S > 1e-9])
    U, S, _ = np.linalg.svd(np.hstack(left), full_matrices=False)
    _, R, Vh = np.linalg.svd(np.vstack(right), full_matrices=False)
    U, Vh = U[:, S > 1e-6], Vh[R > 1e-6]
    return U, [U.T @ tau @ Vh.T for tau in taus], Vh


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("rank", [None, 2])
def test_ties_in_core_space_is_the_authors_recipe(rank: int | None, density: float, dtype: torch.dtype) -> None:
    base, experts = random_experts(3, rank=rank, dtype=dtype)
    base = {name: base[name] for name in MATRICES}
    merged = twin_bench.merge("core_space", base, experts, density=density, scaling=0.9)
    spaces = {name: cores(deltas(base, experts, name)) for name in MATRICES}
    flat = [np.concatenate([M[index].ravel() for _, M, _ in spaces.values()]) for index in range(3)]
    sizes = np.cumsum([M[0].size for _, M, _ in spaces.values()])
    pieces = np.split(ties_by_loops(flat, density), sizes[:-1])
    for (name, (U, M, Vh)), piece in zip(spaces.items(), pieces, strict=True):
        assert_moved(merged[name], base[name], 0.9 * U @ piece.reshape(M[0].shape) @ Vh)


@pytest.mark.parametrize("rank", [None, 2])
def test_nothing_is_lost(rank: int | None) -> None:
    """A sum is the same in any basis, and so is what orthogonalises or flattens what LoRA experts have."""
    base, experts = random_experts(3, rank=rank)
    for inner in ("task_arithmetic", "average", "iso_c", *(() if rank is None else ("tsv_m",))):
        expected = twin_bench.merge(inner, base, experts)
        for name, found in twin_bench.merge("core_space", base, experts, merge=inner).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)


def test_dare_draws_core_entries() -> None:
    base, experts = random_experts(2, rank=2, dtype=torch.float64)
    options: dict[str, Any] = {"merge": "dare_task_arithmetic", "density": 0.5, "scaling": 1.0}
    one = twin_bench.merge("core_space", base, experts, **options, seed=1)
    other = twin_bench.merge("core_space", base, experts, **options, seed=2)
    for name in MATRICES:
        U, M, Vh = cores(deltas(base, experts, name))
        found = U.T @ (one[name] - base[name]).numpy() @ Vh.T
        choices = [a + b for a in (0 * M[0], 2 * M[0]) for b in (0 * M[1], 2 * M[1])]
        assert np.min([abs(found - choice) for choice in choices], axis=0).max() < 1e-9
        assert not torch.equal(one[name], other[name])


def test_the_factors_of_an_adapter_do_not_matter() -> None:
    """B R and R^-1 A are the same expert, whatever R."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(9, 8, dtype=torch.float64)}
    factors = [(torch.randn(9, 2, generator=generator), torch.randn(2, 8, generator=generator)) for _ in range(3)]
    plain = {f"t{i}": {"w": B.double() @ A.double()} for i, (B, A) in enumerate(factors)}
    R = torch.tensor([[3.0, 1.0], [0.0, 0.01]], dtype=torch.float64)
    other = {f"t{i}": {"w": (B.double() @ R) @ (R.inverse() @ A.double())} for i, (B, A) in enumerate(factors)}
    found, expected = (twin_bench.merge("core_space", base, experts)["w"] for experts in (plain, other))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_one_expert_or_equal_ones_come_back(rank: int | None, count: int) -> None:
    base, experts = random_experts(1, rank=rank)
    equal = {f"copy{index}": experts["task0"] for index in range(count)}
    for name, found in twin_bench.merge("core_space", base, equal, density=1.0, scaling=1.0).items():
        torch.testing.assert_close(found, experts["task0"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", INNER)
def test_any_data_free_merge_can_be_done_there(name: str) -> None:
    base, tuned = models(experts=EXPERTS[name])
    base["positions"] = torch.arange(4)
    merged = twin_bench.merge("core_space", base, tuned, merge=name)
    assert torch.equal(merged["positions"], base["positions"])
    assert all(merged[tensor].isfinite().all() for tensor in base)
    assert not torch.equal(merged["tall"], base["tall"])


def test_what_no_expert_changed_does_not_count_in_the_trim() -> None:
    base, experts = random_experts(3)
    merged = twin_bench.merge("core_space", base, experts)
    idle = {"embeddings": torch.ones(500, 20), "norm": torch.ones(900)}
    wider = {task: {**expert, **idle} for task, expert in experts.items()}
    found = twin_bench.merge("core_space", {**base, **idle}, wider)
    assert all(torch.equal(found[name], merged[name]) for name in base)
    assert all(torch.equal(found[name], tensor) for name, tensor in idle.items())


def test_what_it_builds_on() -> None:
    base, experts = random_experts(2)
    for unfit in ("lines", "core_space", "pretrained", "emr"):
        with pytest.raises(InputError, match=f"merge must be a data-free method that builds on no other, not {unfit}"):
            twin_bench.merge("core_space", base, experts, merge=unfit)
    with pytest.raises(InputError, match="core_space has no option 'seed'"):
        twin_bench.merge("core_space", base, experts, seed=1)
