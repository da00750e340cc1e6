"""Model Breadcrumbs (Davari and Belilovsky, 2024): drop the outliers and the negligible, then task arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.methods.task_arithmetic import task_arithmetic
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="Model Breadcrumbs", paper="arXiv:2312.06795", track="data-free", tune=SCALINGS)
def breadcrumbs(
    vectors: TaskVectors, *, scaling: float = 0.2, density: float = 0.15, gamma: float = 0.006
) -> Mapping[str, Tensor]:
    """theta_0 + scaling * sum_t m_t * tau_t, m_t dropping a tensor's outliers and its negligible entries.

    m_t drops the int(gamma * n) largest of a tensor's n entries by magnitude. It keeps the int(density * n) largest of
    the rest (at least one), unscaled. Equal magnitudes are ranked by position. The ranking is per tensor, as in the
    paper and mergekit; the authors' code ranks each row of a matrix separately. The defaults are the point from which
    the authors' code starts its search. If gamma + density is more than 1, mergekit drops fewer outliers. Here outliers
    are always dropped, as in the authors' code. mergekit drops *all* entries of a tensor of fewer than 1 / gamma
    entries, such as a small bias, because it has no outlier there to count from. Here such a tensor keeps its largest
    entries.

    Raises InputError unless 0 < density <= 1 and 0 <= gamma < 1.
    """
    require_fraction("breadcrumbs", "density", density)
    if not 0 <= gamma < 1:
        raise InputError(f"breadcrumbs: gamma must be in [0, 1), not {gamma}")

    def trim(name: str, taus: Tensor) -> Tensor:
        for tau in taus:
            tau.masked_fill_(~middle(tau.abs().flatten(), density, gamma).view(tau.shape), 0.0)
        return taus

    return task_arithmetic(vectors.map(trim), scaling=scaling)


def middle(magnitudes: Tensor, density: float, gamma: float) -> Tensor:
    """Return a mask of the int(density * n) largest magnitudes (n,), once the int(gamma * n) largest are dropped."""
    total = len(magnitudes)
    outliers = int(gamma * total)
    kept = max(1, int(density * total))
    return largest(magnitudes, min(total, outliers + kept)) & ~largest(magnitudes, outliers)


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` largest of magnitudes (n,). Equal magnitudes are ranked by position."""
    if not count:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    threshold = magnitudes.kthvalue(len(magnitudes) - count + 1).values  # a sort needs four times the memory
    chosen = magnitudes > threshold
    equal = (magnitudes == threshold).nonzero().squeeze(1)
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen
