"""SCE (Wan et al., 2024): select entries that differ, calculate weights, erase minority signs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.merging.registry import merge_method, require_fraction
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="SCE", paper="arXiv:2408.07990", track="data-free")
def sce(vectors: TaskVectors, *, select_topk: float = 1.0) -> Mapping[str, Tensor]:
    """theta_0 + sum_t w_t tau_t / sum_t w_t over the entries that have the sign of sum_t tau_t, tensor by tensor.

    Of the entries whose variance over the experts is not 0, the `select_topk` with the largest variance are kept, and
    the others are 0 in all task vectors. w_t is the sum of squares of what is kept of tau_t. A sum of exactly 0 counts
    as positive. This is mergekit's sce, and its default.
    """
    require_fraction("sce", "select_topk", select_topk)

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        if select_topk < 1:
            taus *= most_varied(taus, select_topk)
        weights = torch.stack([torch.linalg.vector_norm(tau, dtype=torch.float64) for tau in taus]).square()
        if not weights.any():
            return base
        positive = taus.sum(dim=0) >= 0
        total, weight = torch.zeros_like(base), torch.zeros_like(base)
        for tau, w in zip(taus, (weights / weights.sum()).tolist(), strict=True):
            agree = torch.where(positive, tau > 0, tau < 0)
            total += torch.where(agree, tau, 0.0).mul_(w)
            weight.add_(agree, alpha=w)
        return base + total / weight.where(weight > 0, 1.0)

    return vectors.merged(merge)


def most_varied(taus: Tensor, fraction: float) -> Tensor:
    """Return a mask (*shape) of the entries with the largest variance over dim 0, a fraction of those that vary."""
    variance = taus.var(dim=0, correction=0).flatten()
    kept = variance.topk(int(fraction * variance.count_nonzero())).indices
    return torch.zeros_like(variance, dtype=torch.bool).index_fill_(0, kept, True).view(taus.shape[1:])
