"""NuSLERP against the arc's formula, on task vectors and on weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import SHAPES, assert_moved, random_experts
from twin_bench import InputError
from twin_bench.errors import UnsuitedError


def arc(one: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    """Turn in the plane of the two, by Gram-Schmidt: no sine of the angle between them divides."""
    a, b = one.ravel(), other.ravel()
    along = a / np.linalg.norm(a)
    across = b - (b @ along) * along
    angle = np.arctan2(np.linalg.norm(across), b @ along)
    across = across / np.linalg.norm(across)
    # of vectors of unequal length: the part of b across a, and what is left of a
    right = np.sin(t * angle) / np.sin(angle)
    left = np.cos(t * angle) - right * np.cos(angle)
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    turned = np.cos(angle) * along + np.sin(angle) * across
    return (left * lengths[0] * along + right * lengths[1] * turned).reshape(one.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_follows_the_arc_of_the_task_vectors(t: float, dtype: torch.dtype) -> None:
    base, experts = random_experts(2, dtype=dtype)
    merged = twin_bench.merge("nuslerp", base, experts, t=t)
    for name in SHAPES:
        one, other = ((expert[name].double() - base[name].double()).numpy() for expert in experts.values())
        assert_moved(merged[name], base[name], arc(one, other, t))


@pytest.mark.parametrize("size", [0.5, 1e-3])
def test_follows_the_arc_of_the_weights(size: float) -> None:
    """Experts 1e-3 apart have a cosine of 1 - 1e-6: float32 would see no angle."""
    base, experts = random_experts(2, dtype=torch.float64, size=size)
    merged = twin_bench.merge("nuslerp", base, experts, t=0.3, origin="zero")
    elsewhere = twin_bench.merge("nuslerp", experts["task0"], experts, t=0.3, origin="zero")
    for name in SHAPES:
        one, other = (expert[name].numpy() for expert in experts.values())
        assert_moved(merged[name], torch.zeros_like(base[name]), arc(one, other, 0.3))
        torch.testing.assert_close(elsewhere[name], merged[name])


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_on_one_line_it_is_the_chord(factor: float) -> None:
    base = {"w": torch.zeros(3)}
    tau = torch.tensor([1.0, -2.0, 0.5])
    found = twin_bench.merge("nuslerp", base, {"a": {"w": tau}, "b": {"w": factor * tau}}, t=0.25)["w"]
    torch.testing.assert_close(found, 0.75 * tau + 0.25 * factor * tau)


def test_refusals() -> None:
    base, experts = random_experts(3)
    with pytest.raises(UnsuitedError, match="nuslerp: an arc joins two experts, there are 3"):
        twin_bench.merge("nuslerp", base, experts)
    del experts["task2"]
    with pytest.raises(InputError, match=r"nuslerp: t must be in \[0, 1\], not 1.5"):
        twin_bench.merge("nuslerp", base, experts, t=1.5)
    for method in ("nuslerp", "multislerp"):
        with pytest.raises(InputError, match=f'{method}: origin must be "base" or "zero", not \'sun\''):
            twin_bench.merge(method, base, experts, origin="sun")
