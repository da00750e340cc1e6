"""Every method on tensors of every number of dimensions, and on empty ones, beside what it gives without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import twin_bench
from tests.support.merges import EXPERTS, STATIC, TOLD, models
from twin_bench.adaptive.adamerging import learn_coefficients
from twin_bench.merging.task_vectors import TaskVectors

EMPTY = {"empty": (0,), "no rows": (0, 5), "no columns": (5, 0)}
ODD = {"scalar": (), "one": (1,), "row": (1, 7), "column": (7, 1), "cube": (2, 3, 4)}


def with_shapes(shapes: dict[str, tuple[int, ...]], experts: int) -> tuple[Any, Any]:
    base, tuned = models(experts=experts)
    generator = torch.Generator().manual_seed(1)
    for name, shape in shapes.items():
        base[name] = torch.randn(shape, generator=generator)
        for expert in tuned.values():
            expert[name] = base[name] + 0.1 * torch.randn(shape, generator=generator)
    base["layers.0.norm"] = torch.ones(3)
    for expert in tuned.values():
        expert["layers.0.norm"] = torch.ones(3)
    return base, tuned


def inputs_of(name: str, base: dict[str, Tensor], tuned: dict[str, Any]) -> dict[str, Any]:
    if name in TOLD:
        return {"task": "task0"}
    if name == "fisher":
        return {"statistics": {task: {n: t.square() for n, t in base.items()} for task in tuned}}
    if name == "regmean":
        grams = {n: torch.eye(t.shape[1]) for n, t in base.items() if t.ndim == 2}
        return {"statistics": dict.fromkeys(tuned, grams)}
    return {}


@pytest.mark.parametrize("name", [*STATIC, *TOLD, "fisher", "regmean"])
def test_empty_tensors_change_nothing(name: str) -> None:
    base, tuned = with_shapes(EMPTY, EXPERTS.get(name, 4))
    merged = twin_bench.merge(name, base, tuned, **inputs_of(name, base, tuned))
    full = {n: t for n, t in base.items() if n not in EMPTY}
    own = {task: {n: expert[n] for n in full} for task, expert in tuned.items()}
    alone = twin_bench.merge(name, full, own, **inputs_of(name, full, own))
    assert all(torch.equal(merged[n], tensor) for n, tensor in alone.items())
    assert all(merged[n].shape == torch.Size(shape) for n, shape in EMPTY.items())


@pytest.mark.parametrize("name", [*STATIC, *TOLD, "fisher", "regmean"])
def test_every_number_of_dimensions_merges_between_the_experts(name: str) -> None:
    base, tuned = with_shapes(ODD, EXPERTS.get(name, 4))
    merged = twin_bench.merge(name, base, tuned, **inputs_of(name, base, tuned))
    for parameter, shape in ODD.items():
        assert merged[parameter].shape == torch.Size(shape)
        taus = torch.stack([expert[parameter] - base[parameter] for expert in tuned.values()])
        moved = merged[parameter] - base[parameter]
        assert moved.norm() <= 4 * taus.flatten().norm() + 1e-5


def test_fisher_and_average_of_a_number() -> None:
    base, tuned = with_shapes({"scalar": ()}, 2)
    statistics = inputs_of("fisher", base, tuned)["statistics"]
    found = twin_bench.merge("fisher", base, tuned, statistics=statistics)["scalar"]
    mean = twin_bench.merge("average", base, tuned)["scalar"]
    torch.testing.assert_close(found, (tuned["task0"]["scalar"] + tuned["task1"]["scalar"]) / 2)
    torch.testing.assert_close(mean, found)


def test_coefficients_of_a_number_are_learned() -> None:
    base, tuned = with_shapes({"scalar": ()}, 2)
    learned = learn_coefficients(
        TaskVectors(base, tuned), lambda parameters: parameters, scaling=0.3, steps=2, learning_rate=0.01
    )
    assert learned["scalar"].shape == (2,)
    assert (learned["scalar"] != 0.3).all()
