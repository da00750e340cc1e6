"""TIES-Merging (Yadav et al., 2023): trim, elect sign, disjoint mean."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from twin_bench.merging.elections import disjoint_mean, trim, trim_thresholds
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="TIES", paper="arXiv:2306.01708", track="data-free", tune=SCALINGS)
def ties(vectors: TaskVectors, *, scaling: float = 1.0, density: float = 0.2) -> Mapping[str, Tensor]:
    """theta_0 + scaling * the mean of the trimmed task vectors' entries that agree with the elected sign.

    Each task vector keeps its int(density * d) largest entries by magnitude *over the whole model* of d entries, as in
    the paper. The authors' code keeps one entry more, because the threshold that it takes is the largest entry to drop.
    peft and mergekit trim each tensor separately, so they agree with this on a model of one tensor. The sign of an
    entry is that of the trimmed vectors' sum. If the sum is exactly 0 the entry is dropped, as in peft; the authors'
    code gives it the model's majority sign. The mean is over the entries that agree, as in the paper, the authors' code
    and peft. FusionBench (merge_func: sum) and AdaMerging's code (dis-sum) take the sum instead, and mergekit does
    without normalize: true.
    """
    require_fraction("ties", "density", density)
    thresholds = trim_thresholds(vectors, density)
    trimmed = vectors.map(lambda name, taus: trim(taus, thresholds))
    return trimmed.merged(lambda name, base, taus: base + scaling * disjoint_mean(taus))
