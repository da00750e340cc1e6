"""The lower bound: no merging at all."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from twin_bench.merging.registry import merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="Pretrained", paper="", track="bound")
def pretrained(vectors: TaskVectors) -> Mapping[str, Tensor]:
    """theta_0: the base model as it is, under each task's own head."""
    return vectors.merged(lambda name, base, taus: base)
