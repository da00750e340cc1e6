"""SLERP against scipy's on the unit sphere, and against its formula off it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

import twin_bench
from tests.support.merges import models
from twin_bench import InputError
from twin_bench.errors import UnsuitedError

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-5}}


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_slerp_is_scipys_on_a_sphere(t: float) -> None:
    base, tuned = models(torch.float64, experts=2)
    unit = {task: {name: 3 * x / x.norm() for name, x in expert.items()} for task, expert in tuned.items()}
    for name, found in twin_bench.merge("slerp", base, unit, t=t).items():
        ends = [expert[name].numpy().ravel() / 3 for expert in unit.values()]
        expected = 3 * geometric_slerp(*ends, t).reshape(found.shape)
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slerp_of_tensors_of_unlike_size_is_its_formula(dtype: torch.dtype) -> None:
    base, tuned = models(dtype, experts=2)
    first, second = tuned["task0"], {name: 2 * tensor - base[name] * 0.5 for name, tensor in tuned["task1"].items()}
    for name, found in twin_bench.merge("slerp", base, {"a": first, "b": second}, t=0.3).items():
        one, two = first[name].double().numpy(), second[name].double().numpy()
        phi = np.arccos(np.vdot(one, two) / np.sqrt(np.vdot(one, one) * np.vdot(two, two)))
        expected = (np.sin(0.7 * phi) * one + np.sin(0.3 * phi) * two) / np.sin(phi)
        torch.testing.assert_close(found, torch.from_numpy(expected).to(dtype), **CLOSE[dtype])


def test_nearly_collinear_experts_are_interpolated_on_the_chord() -> None:
    base, tuned = models(experts=2)
    for sign in (1, -1):
        other = {name: sign * 5 * tensor + 1e-3 for name, tensor in tuned["task0"].items()}
        merged = twin_bench.merge("slerp", base, {"a": tuned["task0"], "b": other}, t=0.3)
        for name, found in merged.items():
            torch.testing.assert_close(found, 0.7 * tuned["task0"][name] + 0.3 * other[name])


def test_the_ends_are_the_experts_and_the_way_back_is_the_same() -> None:
    base, tuned = models(experts=2)
    backwards = dict(reversed(tuned.items()))
    for name in base:
        there = twin_bench.merge("slerp", base, tuned, t=0.2)[name]
        torch.testing.assert_close(twin_bench.merge("slerp", base, backwards, t=0.8)[name], there)
        torch.testing.assert_close(twin_bench.merge("slerp", base, tuned, t=0.0)[name], tuned["task0"][name])
        torch.testing.assert_close(twin_bench.merge("slerp", base, tuned, t=1.0)[name], tuned["task1"][name])


@pytest.mark.parametrize("t", [0.3, 1 / 3, 0.7])
def test_equal_experts_come_back_and_unchanged_tensors_are_the_bases(t: float) -> None:
    base, tuned = models(experts=1)
    for name, found in twin_bench.merge("slerp", base, {"a": tuned["task0"], "b": tuned["task0"]}, t=t).items():
        torch.testing.assert_close(found, tuned["task0"][name])
    for name, found in twin_bench.merge("slerp", base, {"a": base, "b": base}, t=t).items():
        assert torch.equal(found, base[name])


def test_a_tensor_of_zeros_is_at_a_right_angle() -> None:
    tuned = {"a": {"w": torch.zeros(3)}, "b": {"w": torch.tensor([0.0, 3.0, 4.0])}}
    merged = twin_bench.merge("slerp", {"w": torch.zeros(3)}, tuned, t=0.5)
    torch.testing.assert_close(merged["w"], torch.tensor([0.0, 3.0, 4.0]) * 0.5**0.5)


def test_errors() -> None:
    for experts in (1, 3):
        with pytest.raises(UnsuitedError, match=f"an arc joins two experts, there are {experts}"):
            twin_bench.merge("slerp", *models(experts=experts))
    with pytest.raises(InputError, match=r"slerp: t must be in \[0, 1\]"):
        twin_bench.merge("slerp", *models(experts=2), t=1.5)
