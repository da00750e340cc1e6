"""Model Stock against the paper's interpolation of weights, pair by pair."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine as cosine_distance

import twin_bench
from tests.support.merges import models
from twin_bench.errors import UnsuitedError

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-5}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("common", [0.0, 0.2])
def test_model_stock_is_its_formula(dtype: torch.dtype, experts: int, common: float) -> None:
    """With a common part the angles are sharp; without it they are near a right angle, on either side."""
    base, tuned = models(dtype, experts=experts)
    tuned = {task: {name: tensor + common for name, tensor in expert.items()} for task, expert in tuned.items()}
    merged = twin_bench.merge("model_stock", base, tuned)
    for name in base:
        origin = base[name].double().numpy()
        thetas = [expert[name].double().numpy() for expert in tuned.values()]
        pairs = combinations([(theta - origin).ravel() for theta in thetas], 2)
        cosine = np.mean([1 - cosine_distance(one, other) for one, other in pairs])
        t = experts * cosine / (1 + (experts - 1) * cosine)
        expected = t * sum(thetas) / experts + (1 - t) * origin
        torch.testing.assert_close(merged[name], torch.from_numpy(expected).to(dtype), **CLOSE[dtype])


def test_equal_experts_come_back_and_orthogonal_ones_leave_the_base() -> None:
    base, tuned = models(experts=1)
    for name, found in twin_bench.merge("model_stock", base, {t: tuned["task0"] for t in "abc"}).items():
        torch.testing.assert_close(found, tuned["task0"][name])
    origin = torch.tensor([1.0, 2.0, 3.0])
    right = {"a": {"w": origin + torch.tensor([0.5, 0, 0])}, "b": {"w": origin + torch.tensor([0, 7.0, 0])}}
    assert torch.equal(twin_bench.merge("model_stock", {"w": origin}, right)["w"], origin)


def test_the_size_of_a_change_does_not_move_the_angle() -> None:
    base, tuned = models(experts=2)
    shrunk = {t: {n: base[n].double() + 1e-9 * (e[n].double() - base[n]) for n in base} for t, e in tuned.items()}
    merged = twin_bench.merge("model_stock", base, tuned)
    exact = {name: tensor.double() for name, tensor in base.items()}
    for name, found in twin_bench.merge("model_stock", exact, shrunk).items():
        change = 1e9 * (found - exact[name])
        torch.testing.assert_close(change, merged[name].double() - exact[name], rtol=1e-3, atol=1e-5)


def test_opposite_experts_leave_the_base() -> None:
    base = {"w": torch.tensor([1.0, -2.0])}
    opposite = {"a": {"w": torch.tensor([1.5, -1.0])}, "b": {"w": torch.tensor([-0.5, -5.0])}}
    assert torch.equal(twin_bench.merge("model_stock", base, opposite)["w"], base["w"])


def test_one_expert_has_no_angle() -> None:
    with pytest.raises(UnsuitedError, match="needs two of them"):
        twin_bench.merge("model_stock", *models(experts=1))
