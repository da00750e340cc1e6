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

    Each task vector keeps its `density` largest entries by magnitude *over the whole model*, as in the paper and the
    authors' code. peft and mergekit trim each tensor separately, so the three agree on a model of one tensor. The sign
    of an entry is that of the trimmed vectors' sum. If the sum is exactly 0 the entry is dropped, as in peft; the
    authors' code gives it the model's majority sign. The mean is over the entries that agree, as in the paper; two
    large libraries take the sum instead.
    """
    require_fraction("ties", "density", density)
    thresholds = trim_thresholds(vectors, density)
    trimmed = vectors.map(lambda name, taus: trim(taus, thresholds))
    return trimmed.merged(lambda name, base, taus: base + scaling * disjoint_mean(taus))
