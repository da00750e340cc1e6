"""The Karcher mean against its iteration on whole vectors, and against what defines it: a minimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import twin_bench
from tests.support.matrices import SHAPES, assert_moved, random_experts
from twin_bench import InputError


def mean_of(points: list[np.ndarray], max_iter: int, tol: float) -> np.ndarray:
    flat = [point.ravel() for point in points]
    norms = [np.linalg.norm(point) for point in flat]
    units = [point / norm for point, norm in zip(flat, norms, strict=True)]
    mean = sum(units) / np.linalg.norm(sum(units))
    for _ in range(max_iter):
        tangent = 0 * mean
        for unit in units:
            angle = np.arccos(np.clip(mean @ unit, -1, 1))
            if angle >= tol:
                tangent = tangent + angle / np.sin(angle) * (unit - (mean @ unit) * mean) / len(units)
        length = np.linalg.norm(tangent)
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
        mean /= np.linalg.norm(mean)
    return np.mean(norms) * mean.reshape(points[0].shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "size", "max_iter"), [(2, 0.5, 10), (4, 2.0, 10), (3, 2.0, 1), (3, 1.0, 0)])
def test_is_mergekits_iteration(count: int, size: float, max_iter: int, dtype: torch.dtype) -> None:
    base, experts = random_experts(count, dtype=dtype, size=size)
    merged = twin_bench.merge("karcher", base, experts, max_iter=max_iter)
    elsewhere = twin_bench.merge("karcher", experts["task0"], experts, max_iter=max_iter)
    for name in SHAPES:
        expected = mean_of([expert[name].double().numpy() for expert in experts.values()], max_iter, 1e-5)
        for found in (merged[name], elsewhere[name]):
            assert_moved(found, 0 * base[name], expected)


def test_no_point_of_the_sphere_has_smaller_squared_angles() -> None:
    base, experts = random_experts(3, dtype=torch.float64, size=2.0)
    merged = twin_bench.merge("karcher", base, experts, max_iter=100, tol=1e-12)
    generator = torch.Generator().manual_seed(0)

    def angles(point: torch.Tensor, name: str) -> float:
        flat = [expert[name].flatten() for expert in experts.values()]
        cosines = [torch.nn.functional.cosine_similarity(point.flatten(), other, dim=0) for other in flat]
        return float(sum(cosine.acos().square() for cosine in cosines))

    for name in ("tall", "vector"):
        least = angles(merged[name], name)
        for _ in range(5):
            aside = torch.randn(merged[name].shape, generator=generator, dtype=torch.float64)
            assert angles(merged[name] + 1e-3 * aside, name) > least


def test_one_expert_comes_back() -> None:
    base, experts = random_experts(1)
    for name, found in twin_bench.merge("karcher", base, experts).items():
        torch.testing.assert_close(found, experts["task0"][name])


def test_refuses_options_out_of_range() -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match="karcher: tol must be above 0"):
        twin_bench.merge("karcher", base, experts, tol=0.0)
