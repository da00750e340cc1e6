"""Weight averaging."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from twin_bench.merging.registry import merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="Weight average", paper="arXiv:2203.05482", track="data-free")
def average(vectors: TaskVectors) -> Mapping[str, Tensor]:
    """theta_0 + (1/T) sum_t tau_t, which is the mean of the experts.

    It is computed from task vectors, so that a parameter no expert changed stays the base's, bit for bit.
    """
    return vectors.merged(lambda name, base, taus: base + taus.mean(dim=0))
