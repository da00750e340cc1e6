"""The steps of TIES that several methods share: trim task vectors, elect a sign for each entry, average what agrees."""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.merging.order_statistics import order_statistics
from twin_bench.merging.task_vectors import TaskVectors


def trim(taus: Tensor, thresholds: Tensor) -> Tensor:
    """Return (T, *shape) `taus`, changed in place: an expert's entries below its threshold in magnitude become 0."""
    for tau, threshold in zip(taus, thresholds, strict=True):
        tau.masked_fill_(tau.abs().to(torch.float32) < threshold, 0.0)
    return taus


def disjoint_mean(taus: Tensor) -> Tensor:
    """Return the mean over dim 0 of the entries that have the sign of the sum; 0 if there is none.

    The other entries of `taus` become 0.
    """
    elected = taus.sum(dim=0).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tau in taus:  # one at a time: temporaries for all would double the memory
        agree = tau * elected > 0
        count += agree
        total += tau.masked_fill_(~agree, 0.0)
    return total.div_(count.clamp_(min=1))


def trim_thresholds(vectors: TaskVectors, density: float) -> Tensor:
    """Return, for each expert, the magnitude of its int(density * d)-th largest entry over the whole model.

    d is the number of entries of `vectors`, which need not have the base's shapes. With density 1 the thresholds are 0.
    """
    if density == 1:
        return torch.zeros(len(vectors.experts))
    (thresholds,) = order_statistics(vectors, torch.abs, lambda total: [max(1, int(density * total))])
    return thresholds
