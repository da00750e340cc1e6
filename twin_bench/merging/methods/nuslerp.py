"""NuSLERP (mergekit, Goddard et al., 2024): the arc between two task vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from twin_bench.errors import InputError, UnsuitedError
from twin_bench.merging.registry import merge_method
from twin_bench.merging.spheres import combined, require_origin
from twin_bench.merging.task_vectors import TaskVectors

COLLINEAR = 1e-8
"""Below this sine the arc is replaced by its chord, as in mergekit."""


@merge_method(title="NuSLERP", paper="arXiv:2403.13257", track="data-free")
def nuslerp(vectors: TaskVectors, *, t: float = 0.5, origin: str = "base") -> Mapping[str, Tensor]:
    """theta_0 + (sin((1 - t) phi) tau_1 + sin(t phi) tau_2) / sin(phi), phi the angle between the two task vectors.

    The angle is that of whole tensors, mergekit's nuslerp_flatten; it can also take rows or columns. If sin(phi) is
    below 1e-8, the result is theta_0 + (1 - t) tau_1 + t tau_2. With origin "zero" the experts' weights stand in the
    place of their task vectors, and theta_0 plays no part: mergekit's nuslerp without a base model. That differs from
    `slerp` where the cosine is above 0.9995, as between experts of one base it mostly is.

    Raises InputError unless 0 <= t <= 1, and UnsuitedError unless there are two experts.
    """
    require_origin("nuslerp", origin)
    if not 0 <= t <= 1:
        raise InputError(f"nuslerp: t must be in [0, 1], not {t}")
    if len(vectors.experts) != 2:
        raise UnsuitedError(f"nuslerp: an arc joins two experts, there are {len(vectors.experts)}")

    def arc(products: Tensor) -> Tensor:
        size = float(products[0, 0] * products[1, 1]) ** 0.5
        angle = math.acos(min(1.0, max(-1.0, float(products[0, 1]) / size))) if size else 0.0
        if math.sin(angle) < COLLINEAR:
            return products.new_tensor([1 - t, t])
        return products.new_tensor([math.sin((1 - t) * angle), math.sin(t * angle)]) / math.sin(angle)

    return combined(vectors, arc, origin=origin)
