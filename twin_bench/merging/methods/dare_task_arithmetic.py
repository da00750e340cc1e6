"""DARE (Yu et al., 2024) with task arithmetic: drop task-vector entries at random, rescale the rest, then merge."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from twin_bench.merging.drawing import drop_and_rescale
from twin_bench.merging.methods.task_arithmetic import task_arithmetic
from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(
    title="DARE + task arithmetic",
    paper="arXiv:2311.03099",
    track="data-free",
    needs=("seed",),
    tune=SCALINGS,
)
def dare_task_arithmetic(
    vectors: TaskVectors, *, scaling: float = 0.3, density: float = 0.3, seed: int = 0
) -> Mapping[str, Tensor]:
    """theta_0 + scaling * sum_t tau_t * Bernoulli(density) / density; the paper's drop rate is 1 - density."""
    return task_arithmetic(drop_and_rescale(vectors, density, seed), scaling=scaling)
