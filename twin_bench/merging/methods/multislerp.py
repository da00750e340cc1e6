"""Multi-SLERP (mergekit, Goddard, 2025): the mean direction of task vectors, at their mean length."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from twin_bench.merging.registry import merge_method
from twin_bench.merging.spheres import combined, require_origin
from twin_bench.merging.task_vectors import TaskVectors

CANCELLED = 1e-8
"""Below this length of the mean of the unit vectors they have no mean direction, as in mergekit."""


@merge_method(title="Multi-SLERP", paper="arXiv:2403.13257", track="data-free")
def multislerp(vectors: TaskVectors, *, origin: str = "base") -> Mapping[str, Tensor]:
    """theta_0 + mean_t |tau_t| * the direction of sum_t tau_t / |tau_t|, tensor by tensor.

    mergekit projects the unit vectors onto the tangent space at that direction, adds them there and goes back to the
    sphere. At the mean direction their tangent parts sum to 0, so this step moves nothing, and it is left out here. If
    the unit vectors cancel, the result is the mean of the task vectors, as in mergekit for two experts; for more it
    stops with an error. With origin "zero" the experts' weights stand in the place of their task vectors, and theta_0
    plays no part: mergekit's multislerp without a base model. mergekit adds 1e-8 to each norm; this is not done here.
    The experts have equal weights.
    """
    require_origin("multislerp", origin)

    def direction(products: Tensor) -> Tensor:
        norms = products.diagonal().sqrt()
        inverse = norms.reciprocal().where(norms > 0, 0.0)
        length = float(inverse @ products @ inverse) ** 0.5 / len(norms)
        if length < CANCELLED:
            return norms.new_full((len(norms),), 1 / len(norms))
        return norms.mean() * inverse / (len(norms) * length)

    return combined(vectors, direction, origin=origin)
