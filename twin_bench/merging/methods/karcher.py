"""The Karcher mean (Karcher, 1977) of the experts' weights on a sphere, as mergekit (Goddard et al., 2024) has it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.registry import merge_method
from twin_bench.merging.spheres import combined
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="Karcher mean", paper="arXiv:2403.13257", track="data-free")
def karcher(vectors: TaskVectors, *, max_iter: int = 10, tol: float = 1e-5) -> Mapping[str, Tensor]:
    """mean_t |theta_t| * the point of the unit sphere with the least sum of squared angles to theta_t / |theta_t|.

    It is found tensor by tensor from the direction of the mean: each step goes along the mean of the tangents towards
    the experts, by its length. The steps end after `max_iter`, or once that length is below `tol`; angles and norms
    below `tol` count as 0. The sphere is around 0 and its points are weights, as in mergekit, so theta_0 plays no part.
    Experts of one base are close together on it, and the result is nearly their average.
    """
    if tol <= 0:
        raise InputError(f"karcher: tol must be above 0, not {tol}")

    def mean(products: Tensor) -> Tensor:
        norms = products.diagonal().sqrt()
        counted = norms > tol
        if not counted.any():
            return torch.zeros_like(norms)
        found = torch.zeros_like(norms)
        sizes = norms[counted]
        cosines = products[counted][:, counted] / torch.outer(sizes, sizes)
        found[counted] = norms.mean() * direction(cosines, max_iter=max_iter, tol=tol) / sizes
        return found

    return combined(vectors, mean, origin="zero")


def direction(cosines: Tensor, *, max_iter: int, tol: float) -> Tensor:
    """Return the coefficients (T) of the Karcher mean of unit vectors, given the cosines (T, T) between them."""

    def length(point: Tensor) -> float:
        return max(0.0, float(point @ cosines @ point)) ** 0.5

    point = torch.full_like(cosines[0], 1 / len(cosines))
    if length(point) < tol:
        point = torch.eye(len(cosines)).to(cosines)[0]
    point = point / length(point)
    for _ in range(max_iter):
        towards = (cosines @ point).clamp(-1, 1)
        angles = towards.acos()
        pull = torch.where(angles < tol, 0.0, angles / angles.sin()) / len(cosines)
        tangent = pull - (pull @ towards) * point
        if (step := length(tangent)) < tol:
            break
        point = math.cos(step) * point + math.sin(step) / step * tangent
        point = point / length(point)
    return point
