"""Points on a sphere that are combinations of the experts' tensors: what the methods that follow arcs share.

Whatever such a method does stays in the span of the experts' tensors. So it works on coefficients, and on the inner
products of the tensors, which are a (T, T) matrix in float64. float32 does not resolve the angles between experts of
one base model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.linear_algebra import gram, rows_of
from twin_bench.merging.task_vectors import Merged, TaskVectors

Origin = Literal["base", "zero"]
"""Where the sphere's centre is: at theta_0, so that its points are task vectors, or at 0, so that they are weights."""
Coefficients = Callable[[Tensor], Tensor]
"""A function (inner products (T, T) of T tensors) -> the coefficients (T) of their combination, both in float64.

Both are on the CPU: they are few numbers, which decide how a loop goes on.
"""


def require_origin(method: str, origin: str) -> None:
    """Raise an InputError unless `origin` is "base" or "zero"."""
    if origin not in ("base", "zero"):
        raise InputError(f'{method}: origin must be "base" or "zero", not {origin!r}')


def combined(vectors: TaskVectors, coefficients: Coefficients, *, origin: str) -> Merged:
    """Return, tensor by tensor, theta_0 + sum_t c_t tau_t, or sum_t c_t theta_t if the origin is "zero".

    A parameter that no expert changed stays the base's.
    """

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        if not taus.any():
            return base
        points = taus if origin == "base" else base + taus
        found = coefficients(gram(rows_of(points.reshape(len(points), -1).T)).cpu())
        del points
        merged = torch.tensordot(found.to(taus), taus, dims=1)
        return base + merged if origin == "base" else base + float(found.sum() - 1) * base + merged

    return vectors.merged(merge)
