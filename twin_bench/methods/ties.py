"""TIES-Merging (Yadav et al., 2023): trim, elect sign, disjoint mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from twin_bench.methods import SCALINGS, merge_method, require_fraction
from twin_bench.task_vectors import TaskVectors


@merge_method(title="TIES", paper="arXiv:2306.01708", track="data-free", tune=SCALINGS)
def ties(vectors: TaskVectors, *, scaling: float = 1.0, density: float = 0.2) -> Mapping[str, Tensor]:
    """theta_0 + scaling * the mean of the trimmed task vectors' entries that agree with the elected sign.

    Each task vector keeps its `density` largest entries by magnitude *over the whole model*, as in the
    paper and its code; peft and mergekit trim each tensor by itself, so the three agree on a model of one
    tensor. The sign of an entry is that of the trimmed vectors' sum; where the sum is exactly 0 the entry
    is dropped (the authors' code gives it the model's majority sign; peft drops it too). The mean is over
    the entries that agree, as in the paper: two large peers take the sum instead.
    """
    require_fraction("ties", "density", density)
    thresholds = trim_thresholds(vectors, density) if density < 1 else torch.zeros(len(vectors.experts))

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        limits = thresholds.view(-1, *[1] * base.ndim)
        trimmed = torch.where(taus.abs().to(torch.float32) >= limits, taus, 0.0)
        return base + scaling * disjoint_mean(trimmed)

    return vectors.merged(merge)


def disjoint_mean(taus: Tensor) -> Tensor:
    """Return the mean over dim 0 of the entries whose sign is that of the sum; 0 where none is left."""
    agree = (taus.sign() == taus.sum(dim=0).sign()) & (taus != 0)
    return torch.where(agree, taus, 0.0).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


def trim_thresholds(vectors: TaskVectors, density: float) -> Tensor:
    """Return, for each expert, the magnitude of its int(density * d)-th largest entry over the whole model.

    Two passes over the parameters and no copy of the model: the bit patterns of non-negative float32
    numbers are ordered as the numbers are, so a histogram of the upper 16 bits finds the threshold's bin
    and one of the lower 16 bits its exact value.
    """
    floats = [name for name in vectors if vectors.base[name].is_floating_point()]
    total = sum(vectors.base[name].numel() for name in floats)
    keep = max(1, int(density * total))
    upper = _histograms((_magnitude_bits(vectors[name]) >> 16 for name in floats), len(vectors.experts))
    bins, beyond = _locate(upper, torch.full((len(vectors.experts),), keep))

    def lower_bits() -> Iterable[Tensor]:
        for name in floats:
            bits = _magnitude_bits(vectors[name])
            yield torch.where(bits >> 16 == bins[:, None], bits & 0xFFFF, -1)

    lower, _ = _locate(_histograms(lower_bits(), len(vectors.experts)), keep - beyond)
    return ((bins << 16) | lower).to(torch.int32).view(torch.float32)


def _magnitude_bits(taus: Tensor) -> Tensor:
    return taus.abs().to(torch.float32).flatten(1).view(torch.int32)


def _histograms(chunks: Iterable[Tensor], rows: int) -> Tensor:
    """Return per-row counts (rows, 65536) of the values 0..65535; -1 is not counted."""
    counts = torch.zeros(rows, 1 << 16, dtype=torch.int64)
    for chunk in chunks:
        for row, values in enumerate(chunk):
            counts[row] += torch.bincount(values[values >= 0], minlength=1 << 16)
    return counts


def _locate(counts: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of each row's keep-th largest value, and how many values lie in higher bins."""
    at_least = counts.flip(1).cumsum(1).flip(1)
    bins = (at_least >= keep[:, None]).sum(1) - 1
    return bins, (at_least.gather(1, bins[:, None]) - counts.gather(1, bins[:, None])).squeeze(1)
