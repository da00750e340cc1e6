"""EMR-Merging against its formula, entry by entry in Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import twin_bench
from tests.support.merges import models
from twin_bench import InputError
from twin_bench.merging.registry import find_method


def entry_by_entry(base: Any, tuned: Any, task: str) -> dict[str, torch.Tensor]:
    """Elect, mask and rescale in plain loops over one flat list of the model's entries."""
    flat = {
        t: [v for n in base for v in (e[n].double() - base[n].double()).flatten().tolist()] for t, e in tuned.items()
    }
    kept = []
    for entries in zip(*flat.values(), strict=True):
        total = math.fsum(entries)
        agreeing = [abs(entry) for entry in entries if entry * total > 0]
        own = dict(zip(flat, entries, strict=True))[task]
        kept.append(math.copysign(max(agreeing, default=0.0), total) if own * total > 0 else 0.0)
    scale = math.fsum(map(abs, flat[task])) / math.fsum(map(abs, kept))
    pieces = torch.tensor(kept, dtype=torch.float64).split([tensor.numel() for tensor in base.values()])
    return {
        name: base[name].double() + scale * piece.view(base[name].shape)
        for name, piece in zip(base, pieces, strict=True)
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, {"rtol": 1e-5, "atol": 1e-6}), (torch.bfloat16, {"rtol": 1e-2, "atol": 1e-2})],
)
@pytest.mark.parametrize("task", ["task0", "task2"])
def test_emr_is_the_papers(dtype: torch.dtype, tolerance: dict[str, float], task: str) -> None:
    base, tuned = models(dtype)
    merged = twin_bench.merge("emr", base, tuned, task=task)
    assert merged.keys() == base.keys()
    for name, expected in entry_by_entry(base, tuned, task).items():
        assert merged[name].dtype is dtype
        torch.testing.assert_close(merged[name].double(), expected, **tolerance)


def test_the_scale_keeps_a_task_vectors_length() -> None:
    base, tuned = models()
    for task, expert in tuned.items():
        merged = twin_bench.merge("emr", base, tuned, task=task)
        lengths = [sum((m[n] - base[n]).abs().sum() for n in base) for m in (merged, expert)]
        torch.testing.assert_close(*lengths)


def test_one_expert_and_equal_experts_come_back() -> None:
    base, tuned = models()
    expert = tuned["task1"]
    for experts in ({"a": expert}, {"a": expert, "b": expert, "c": expert}):
        for name, found in twin_bench.merge("emr", base, experts, task="a").items():
            torch.testing.assert_close(found, expert[name])


def test_order_does_not_matter_and_nothing_changed_changes_nothing() -> None:
    base, tuned = models()
    for expert in tuned.values():
        expert["square"] = base["square"].clone()
    base["positions"] = torch.arange(4)
    merged = twin_bench.merge("emr", base, tuned, task="task3")
    backwards = {task: tuned[task] for task in ("task3", "task0", "task2", "task1")}
    for name, other in twin_bench.merge("emr", base, backwards, task="task3").items():
        torch.testing.assert_close(other, merged[name])
    assert torch.equal(merged["square"], base["square"])
    assert torch.equal(merged["positions"], base["positions"])
    for name, found in twin_bench.merge("emr", base, {"a": base, "b": base}, task="b").items():
        assert torch.equal(found, base[name])


def test_entries_whose_sum_is_zero_are_dropped() -> None:
    base = {"w": torch.zeros(3)}
    tuned = {"a": {"w": torch.tensor([1.0, 2.0, 0.0])}, "b": {"w": torch.tensor([-1.0, 4.0, -3.0])}}
    for task, expected in (("a", [0.0, 3.0, 0.0]), ("b", [0.0, 32 / 7, -24 / 7])):
        torch.testing.assert_close(twin_bench.merge("emr", base, tuned, task=task)["w"], torch.tensor(expected))


def test_a_task_must_be_named() -> None:
    base, tuned = models()
    with pytest.raises(InputError, match="set of parameters for each task: name the task with task=, known: task0"):
        twin_bench.merge("emr", base, tuned)
    with pytest.raises(InputError, match="name the task with task=, not 'cola'; known: task0"):
        twin_bench.merge("emr", base, tuned, task="cola")
    with pytest.raises(InputError, match="average has no option 'task'"):
        twin_bench.merge("average", base, tuned, task="task0")


def test_what_it_stores() -> None:
    stored = find_method("emr").stored
    assert stored is not None
    two = [torch.Size((10, 9)), torch.Size((10,))]
    assert stored(two, 8, 4) == 4 * (2 * 100 + 8 * 4 + 8)  # masks of 100 bits are four words of 32 each
    assert stored(two, 8, 2) == 2 * (2 * 100 + 8 * 7 + 8)  # ... or seven of 16
