"""Model Breadcrumbs (Davari and Belilovsky, 2024): drop the outliers and the negligible, then task arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.methods import SCALINGS, merge_method, require_fraction
from twin_bench.methods.task_arithmetic import task_arithmetic
from twin_bench.task_vectors import TaskVectors


@merge_method(title="Model Breadcrumbs", paper="arXiv:2312.06795", track="data-free", tune=SCALINGS)
def breadcrumbs(
    vectors: TaskVectors, *, scaling: float = 0.2, density: float = 0.15, gamma: float = 0.006
) -> Mapping[str, Tensor]:
    """Task arithmetic on each tensor's entries that are neither its outliers nor negligible.

    Of a task vector's tensor of n entries the int(gamma * n) largest by magnitude are dropped, then the
    int(density * n) largest of the rest are kept (at least one), unscaled; equal magnitudes are ranked by
    position. Per tensor, as in the paper and mergekit; the authors' code ranks each row of a matrix by
    itself. The defaults are the point from which the authors' code starts its search. mergekit drops fewer
    outliers where gamma + density is more than 1; here, as in the authors' code, outliers always go.

    Raises InputError unless 0 < density <= 1 and 0 <= gamma < 1.
    """
    require_fraction("breadcrumbs", "density", density)
    if not 0 <= gamma < 1:
        raise InputError(f"breadcrumbs: gamma must be in [0, 1), not {gamma}")

    def trim(name: str, taus: Tensor) -> Tensor:
        return torch.stack([keep_middle(tau, density, gamma) for tau in taus])

    return task_arithmetic(vectors.map(trim), scaling=scaling)


def keep_middle(tau: Tensor, density: float, gamma: float) -> Tensor:
    """Return `tau` with 0 for all but its int(density * n) largest magnitudes after the int(gamma * n) largest."""
    outliers, count = int(gamma * tau.numel()), max(1, int(density * tau.numel()))
    order = tau.flatten().abs().argsort(descending=True, stable=True)
    kept = torch.zeros(tau.numel(), dtype=torch.bool, device=tau.device)
    kept[order[outliers : outliers + count]] = True
    return torch.where(kept.view(tau.shape), tau, 0.0)
