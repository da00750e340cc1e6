"""DARE (Yu et al., 2024) with TIES: drop task-vector entries at random, rescale the rest, then merge."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from twin_bench.merging.drawing import drop_and_rescale
from twin_bench.merging.methods.ties import ties
from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(
    title="DARE + TIES",
    paper="arXiv:2311.03099",
    track="data-free",
    needs=("seed",),
    tune=SCALINGS,
)
def dare_ties(
    vectors: TaskVectors, *, scaling: float = 1.0, density: float = 0.3, trim: float = 1.0, seed: int = 0
) -> Mapping[str, Tensor]:
    """theta_0 + scaling * disjoint_mean_t(tau_t * Bernoulli(density) / density), with the sign election of TIES.

    The random drop replaces the trimming of TIES, as in peft and mergekit. The authors' code trims as well. The option
    `trim` does that: it is the fraction that TIES keeps after the drop.
    """
    return ties(drop_and_rescale(vectors, density, seed), scaling=scaling, density=trim)
