"""KnOTS against the paper's recipe: the SVD of the deltas side by side, its V^T cut apart, TIES on a flat vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

import twin_bench
from tests.support.matrices import MATRICES, SHAPES, assert_moved, deltas, random_experts, ties_by_loops
from twin_bench import InputError


def knots(taus: dict[str, list[np.ndarray]], density: float) -> dict[str, np.ndarray]:
    """Return the merged delta of each parameter; TIES is of one flat vector an expert."""
    bases, factors = {}, {}
    for name, matrices in taus.items():
        U, S, Vh = np.linalg.svd(np.hstack(matrices), full_matrices=False)
        kept = S / S[0] > 1e-4
        bases[name] = U[:, kept]
        factors[name] = np.split(np.diag(S[kept]) @ Vh[kept], len(matrices), axis=1)
    flat = [np.concatenate([factor[index].ravel() for factor in factors.values()]) for index in range(len(matrices))]
    sizes = np.cumsum([factor[0].size for factor in factors.values()])
    pieces = np.split(ties_by_loops(flat, density), sizes[:-1])
    return {name: bases[name] @ piece.reshape(factors[name][0].shape) for name, piece in zip(taus, pieces, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("rank", [None, 2])
def test_is_the_papers_recipe(rank: int | None, density: float, dtype: torch.dtype) -> None:
    base, experts = random_experts(3, rank=rank, dtype=dtype)
    base = {name: base[name] for name in MATRICES}
    merged = twin_bench.merge("knots", base, experts, density=density, scaling=0.9)
    expected = knots({name: deltas(base, experts, name) for name in MATRICES}, density)
    for name in MATRICES:
        assert_moved(merged[name], base[name], 0.9 * expected[name])


def test_bfloat16_experts() -> None:
    base, experts = random_experts(4, dtype=torch.bfloat16)
    base = {name: base[name] for name in MATRICES}
    merged = twin_bench.merge("knots", base, experts, density=1.0, scaling=1.0)
    expected = knots({name: deltas(base, experts, name) for name in MATRICES}, 1.0)
    for name in MATRICES:
        assert_moved(merged[name], base[name], expected[name])


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_is_pefts_ties_on_the_aligned_factors(density: float) -> None:
    base, experts = random_experts(3, rank=2)
    taus = [torch.from_numpy(delta).float() for delta in deltas(base, experts, "wide")]
    U, S, Vh = torch.linalg.svd(torch.cat(taus, dim=1), full_matrices=False)
    aligned = list((S[:6, None] * Vh[:6]).split(SHAPES["wide"][1], dim=1))
    expected = base["wide"] + U[:, :6] @ merge_utils.ties(aligned, torch.ones(3), density)
    found = twin_bench.merge("knots", {"wide": base["wide"]}, experts, density=density, scaling=1.0)["wide"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_no_expert_changed_does_not_count_in_the_trim() -> None:
    base, experts = random_experts(3)
    merged = twin_bench.merge("knots", base, experts)
    idle = {"embeddings": torch.ones(500, 20), "norm": torch.ones(900)}
    wider = twin_bench.merge("knots", {**base, **idle}, {task: {**expert, **idle} for task, expert in experts.items()})
    assert all(torch.equal(wider[name], merged[name]) for name in base)


def test_other_tensors_are_merged_by_ties_as_they_are() -> None:
    base, experts = random_experts(3)
    base = {name: base[name] for name in ("vector", "kernel")}
    merged = twin_bench.merge("knots", base, experts, density=0.4, scaling=0.7)
    for name, found in twin_bench.merge("ties", base, experts, density=0.4, scaling=0.7).items():
        assert torch.equal(found, merged[name])


def test_experts_with_directions_of_their_own_are_all_kept_whole() -> None:
    """Outputs that only one expert changes: rounding in the others' factors must not be averaged in."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(12, 9, generator=generator)}
    moves = [torch.zeros(12, 9) for _ in range(3)]
    for index, move in enumerate(moves):
        move[4 * index : 4 * index + 4] = torch.randn(4, 9, generator=generator) * (index + 1)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    turned = [(rotation @ move.double()).float() for move in moves]
    experts = {f"task{index}": {"w": base["w"] + move} for index, move in enumerate(turned)}
    found = twin_bench.merge("knots", base, experts, density=1.0, scaling=1.0)["w"]
    torch.testing.assert_close(found, base["w"] + sum(turned), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("rank", [None, 2])
def test_one_expert_or_equal_ones_come_back(rank: int | None, count: int) -> None:
    base, experts = random_experts(1, rank=rank)
    equal = {f"copy{index}": experts["task0"] for index in range(count)}
    for name, found in twin_bench.merge("knots", base, equal, density=1.0, scaling=1.0).items():
        torch.testing.assert_close(found, experts["task0"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "knots"])
def test_a_scalar_parameter_is_one_entry(method: str) -> None:
    base = {"scale": torch.tensor(1.0)}
    merged = twin_bench.merge(method, base, {"a": {"scale": torch.tensor(3.0)}}, density=0.5, scaling=1.0)
    assert merged["scale"] == 3.0


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_refuses_a_density_out_of_range(density: float) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=r"knots: density must be in \(0, 1\]"):
        twin_bench.merge("knots", base, experts, density=density)
