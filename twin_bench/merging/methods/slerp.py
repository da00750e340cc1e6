"""Spherical linear interpolation (Shoemake, 1985) of two experts, as mergekit (Goddard et al., 2024) does it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError, UnsuitedError
from twin_bench.merging.registry import merge_method
from twin_bench.merging.task_vectors import TaskVectors

COLLINEAR = 0.9995
"""Above this cosine, or below its negative, the arc is replaced by its chord, as in mergekit."""


@merge_method(title="SLERP", paper="arXiv:2403.13257", track="data-free")
def slerp(vectors: TaskVectors, *, t: float = 0.5) -> Mapping[str, Tensor]:
    """(sin((1 - t) phi) theta_1 + sin(t phi) theta_2) / sin(phi): the point at `t` of the arc between two experts.

    phi is the angle between the experts' tensors *as weights*, seen from 0 and not from theta_0, as in mergekit and
    FusionBench. theta_1 is the expert that is named first; it is their `base_model`. If abs(cos(phi)) > 0.9995 the
    result is (1 - t) theta_1 + t theta_2. A tensor of zeros is at a right angle to any other. Experts of one base
    mostly have cosines above 0.9995, so the result is mostly their weighted mean. That is the method itself, not a
    shortcut of this code.

    Raises InputError unless 0 <= t <= 1, and UnsuitedError unless there are two experts.
    """
    if not 0 <= t <= 1:
        raise InputError(f"slerp: t must be in [0, 1], not {t}")
    if len(vectors.experts) != 2:
        raise UnsuitedError(f"slerp: an arc joins two experts, there are {len(vectors.experts)}")

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        first, second = arc_weights(base + taus, t)
        return base + (first + second - 1) * base + first * taus[0] + second * taus[1]

    return vectors.merged(merge)


def arc_weights(thetas: Tensor, t: float) -> tuple[float, float]:
    """Return the weights of two tensors (2, *shape) at `t` of the arc between them."""
    first, second = torch.nn.functional.normalize(thetas.reshape(2, -1), eps=1e-8)
    cosine = float(first @ second)
    if abs(cosine) > COLLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
