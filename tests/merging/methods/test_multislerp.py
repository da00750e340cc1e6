"""Multi-SLERP against mergekit's algorithm, tangent space and all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import SHAPES, assert_moved, random_experts


def barycentre(points: list[np.ndarray]) -> np.ndarray:
    flat = np.stack([point.ravel() for point in points])
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    units = flat / norms
    mean = units.mean(axis=0)
    mean /= np.linalg.norm(mean)
    tangents = units - (units @ mean)[:, None] * mean
    moved = tangents.mean(axis=0)
    length = np.linalg.norm(moved) + 1e-12
    result = np.cos(length) * mean + np.sin(length) / length * moved
    return (norms.mean() * result).reshape(points[0].shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 5])
def test_is_mergekits_algorithm_on_task_vectors(count: int, dtype: torch.dtype) -> None:
    base, experts = random_experts(count, dtype=dtype)
    merged = twin_bench.merge("multislerp", base, experts)
    for name in SHAPES:
        taus = [(expert[name].double() - base[name].double()).numpy() for expert in experts.values()]
        assert_moved(merged[name], base[name], barycentre(taus))


def test_is_mergekits_algorithm_on_weights() -> None:
    base, experts = random_experts(3, dtype=torch.float64)
    merged = twin_bench.merge("multislerp", base, experts, origin="zero")
    for name in SHAPES:
        assert_moved(merged[name], 0 * base[name], barycentre([expert[name].numpy() for expert in experts.values()]))


def test_lengths_do_not_weigh_directions_and_idle_experts_have_none() -> None:
    base = {"w": torch.zeros(2)}
    taus = {"a": torch.tensor([6.0, 0.0]), "b": torch.tensor([0.0, 3.0]), "idle": torch.zeros(2)}
    merged = twin_bench.merge("multislerp", base, {task: {"w": tau} for task, tau in taus.items()})["w"]
    torch.testing.assert_close(merged, 3 * torch.tensor([0.5, 0.5]).sqrt())


def test_directions_that_cancel_leave_the_mean() -> None:
    base = {"w": torch.zeros(2)}
    experts = {"a": {"w": torch.tensor([4.0, 0.0])}, "b": {"w": torch.tensor([-2.0, 0.0])}}
    assert twin_bench.merge("multislerp", base, experts)["w"].tolist() == [1.0, 0.0]


def test_one_expert_comes_back() -> None:
    base, experts = random_experts(1)
    for name, found in twin_bench.merge("multislerp", base, experts).items():
        torch.testing.assert_close(found, experts["task0"][name])
