"""Consensus merging against the paper's masks, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch

import twin_bench
from tests.support.merges import models
from twin_bench import InputError
from twin_bench.errors import UnsuitedError


def consensus_entry(entries: tuple[float, ...], mask_lambda: float, min_tasks: int) -> float:
    together = math.fsum(entries)
    votes = [abs(x) > mask_lambda * abs(together - x) for x in entries]
    return together if votes.count(True) >= min_tasks else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mask_lambda", "min_tasks"), [(0.4, 2), (0.2, 1), (1.0, 2), (0.6, 4), (0.0, 3)])
def test_consensus_is_its_formula(dtype: torch.dtype, mask_lambda: float, min_tasks: int) -> None:
    base, tuned = models(dtype)
    merged = twin_bench.merge("consensus", base, tuned, scaling=0.6, mask_lambda=mask_lambda, min_tasks=min_tasks)
    for name in base:
        columns = [(expert[name].float() - base[name].float()).flatten().tolist() for expert in tuned.values()]
        kept = [consensus_entry(xs, mask_lambda, min_tasks) for xs in zip(*columns, strict=True)]
        expected = base[name].double() + 0.6 * torch.tensor(kept, dtype=torch.float64).view(base[name].shape)
        torch.testing.assert_close(merged[name], expected.to(dtype))


def test_selfish_and_catastrophic_entries_are_the_bases() -> None:
    """Three tasks' masks: two of them share the first entry, the second is one's alone, the third nobody's."""
    taus = {"a": [3.0, 1.0, 1.0], "b": [3.0, 0.1, 1.0], "c": [-1.0, 0.0, 1.0]}
    tuned = {task: {"w": torch.tensor(tau)} for task, tau in taus.items()}
    merged = twin_bench.merge("consensus", {"w": torch.zeros(3)}, tuned, scaling=1.0, mask_lambda=0.6)
    torch.testing.assert_close(merged["w"], torch.tensor([5.0, 0.0, 0.0]))


def test_asking_nobody_is_task_arithmetic() -> None:
    base, tuned = models()
    for name, expected in twin_bench.merge("task_arithmetic", base, tuned).items():
        assert torch.equal(twin_bench.merge("consensus", base, tuned, min_tasks=0)[name], expected)


def test_two_equal_experts_at_half_the_scale_come_back() -> None:
    base, tuned = models(experts=1)
    merged = twin_bench.merge("consensus", base, {"a": tuned["task0"], "b": tuned["task0"]}, scaling=0.5)
    for name, expected in tuned["task0"].items():
        torch.testing.assert_close(merged[name], expected)


def test_errors() -> None:
    base, tuned = models(experts=1)
    with pytest.raises(UnsuitedError, match="2 tasks must agree and there are 1"):
        twin_bench.merge("consensus", base, tuned)
    for min_tasks in (-1, 1.5):
        with pytest.raises(InputError, match="min_tasks must be a whole number"):
            twin_bench.merge("consensus", base, tuned, min_tasks=min_tasks)
    with pytest.raises(InputError, match="mask_lambda must be at least 0"):
        twin_bench.merge("consensus", base, tuned, mask_lambda=-0.4)
