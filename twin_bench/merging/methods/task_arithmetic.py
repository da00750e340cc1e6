"""Task arithmetic (Ilharco et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(
    title="Task arithmetic",
    paper="arXiv:2212.04089",
    track="data-free",
    tune=SCALINGS,
)
def task_arithmetic(vectors: TaskVectors, *, scaling: float = 0.3) -> Mapping[str, Tensor]:
    """theta_0 + scaling * sum_t tau_t."""
    return vectors.merged(lambda name, base, taus: base + scaling * taus.sum(dim=0))
