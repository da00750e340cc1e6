"""T-Switch against its formula, entry by entry, and against what defines its scale."""

from __future__ import annotations

import math

import pytest
import torch

import twin_bench
from tests.support.matrices import SHAPES, random_experts
from twin_bench import InputError
from twin_bench.merging.methods.t_switch import stored_bytes


def switched(entries: list[float], density: float) -> list[float]:
    positive = sorted((e for e in entries if e > 0), reverse=True)
    negative = sorted(e for e in entries if e < 0)
    kept = [side[: int(density * len(side)) or len(side)] for side in (positive, negative)]
    chosen = set(kept[0]) | set(kept[1])
    scale = math.sqrt(math.fsum(e * e for e in chosen) / len(chosen)) if chosen else 0.0
    return [math.copysign(scale, e) if e in chosen else 0.0 for e in entries]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_is_the_authors_formula(density: float, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    expert = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}
    merged = twin_bench.merge("t_switch", base, {"a": expert, "other": base}, task="a", density=density)
    for name, found in merged.items():
        expected = torch.tensor(switched(expert[name].flatten().tolist(), density), dtype=dtype).view(found.shape)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_length_is_what_the_mask_leaves() -> None:
    base, experts = random_experts(2, dtype=torch.float64)
    merged = twin_bench.merge("t_switch", base, experts, task="task0")
    for name in SHAPES:
        tau, found = experts["task0"][name] - base[name], merged[name] - base[name]
        mask = found.abs() > 1e-9
        assert int(0.4 * tau.numel()) - 1 <= mask.sum() <= int(0.4 * tau.numel())
        torch.testing.assert_close(found.norm(), tau[mask].norm())
        assert torch.equal(found[mask].sign(), tau[mask].sign())
        assert tau[mask & (tau > 0)].min() > tau[~mask & (tau > 0)].max()


def test_only_the_task_that_is_told_counts() -> None:
    base, experts = random_experts(3)
    alone = twin_bench.merge("t_switch", base, {"task1": experts["task1"]}, task="task1")
    for name, found in twin_bench.merge("t_switch", base, experts, task="task1").items():
        assert torch.equal(found, alone[name])


def test_an_expert_that_changed_nothing_is_the_base() -> None:
    base, experts = random_experts(1)
    found = twin_bench.merge("t_switch", base, {**experts, "idle": base}, task="idle")
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_what_it_stores() -> None:
    """Two bits for each of 325 parameters are 650, 21 words of 32; and a scale for each of two tensors."""
    assert stored_bytes([torch.Size((40, 8)), torch.Size((5,))], 3, 4) == 4 * (325 + 3 * (21 + 2))


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_refuses_a_density_out_of_range(density: float) -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match=r"t_switch: density must be in \(0, 1\]"):
        twin_bench.merge("t_switch", base, experts, task="task0", density=density)
