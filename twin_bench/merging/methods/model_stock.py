"""Model Stock (Jang et al., 2024): interpolate to the mean of the experts by the angle between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import UnsuitedError
from twin_bench.merging.registry import merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="Model Stock", paper="arXiv:2403.19522", track="data-free")
def model_stock(vectors: TaskVectors) -> Mapping[str, Tensor]:
    """theta_0 + r mean_t tau_t with r = T c / (1 + (T - 1) c), c the mean cosine of two task vectors, per tensor.

    The paper writes r mean_t theta_t + (1 - r) theta_0, which is the same. Its angle is at theta_0, so it is between
    *task vectors*, in mergekit too. The paper does not define c for T > 2: the authors (issue 2 of their repository)
    and mergekit take the mean of the cosines, FusionBench that of the angles. A task vector of zeros has cosine 0.
    mergekit and the authors' notebook add a constant to the product of the norms, which moves r for a tensor that
    hardly changed; this is not done here. r is negative if the angle is obtuse, as in both. At the pole of r the
    directions of the task vectors cancel, and the tensor is the base's.

    Raises UnsuitedError for one expert, because there is no angle.
    """
    if len(vectors.experts) < 2:
        raise UnsuitedError("model_stock: the angle between experts needs two of them, there is one")
    return vectors.merged(lambda name, base, taus: base + interpolation_ratio(taus) * taus.mean(dim=0))


def interpolation_ratio(taus: Tensor) -> Tensor:
    """Return r of task vectors (T, *shape). It is 0 at its pole, where the sum of their directions vanishes."""
    count = len(taus)
    directions = torch.nn.functional.normalize(taus.reshape(count, -1), eps=torch.finfo(taus.dtype).tiny)
    cosines = directions @ directions.T
    cosine = (cosines.sum() - cosines.trace()) / (count * (count - 1))
    denominator = 1 + (count - 1) * cosine
    return torch.where(denominator > 1e-6, count * cosine / denominator, 0.0)
