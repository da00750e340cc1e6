"""TIES-Merging (Yadav et al., 2023): trim, elect sign, disjoint mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from twin_bench.methods import merge_method, require_fraction
from twin_bench.task_vectors import TaskVectors


@merge_method(title="TIES", paper="arXiv:2306.01708", track="data-free")
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

    def trim(name: str, taus: Tensor) -> Tensor:
        return torch.where(taus.abs().to(torch.float32) >= thresholds.view(-1, *[1] * (taus.ndim - 1)), taus, 0.0)

    return vectors.map(trim).merged(lambda name, base, taus: base + scaling * disjoint_mean(taus))


def disjoint_mean(taus: Tensor) -> Tensor:
    """Return the mean over dim 0 of the entries whose sign is that of the sum; 0 where none is left."""
    elected = taus.sum(dim=0).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tau in taus:  # one at a time: temporaries of all of them would double the memory
        agree = tau * elected > 0
        total += torch.where(agree, tau, 0.0)
        count += agree
    return total / count.clamp(min=1)


def trim_thresholds(vectors: TaskVectors, density: float) -> Tensor:
    """Return, for each expert, the magnitude of its int(density * d)-th largest entry over the whole model.

    Two passes over the parameters and no copy of the model: the bit patterns of non-negative float32
    numbers are ordered as the numbers are, so a histogram of the upper 16 bits finds the threshold's bin
    and one of the lower 16 bits its exact value.
    """
    floats = [name for name in vectors if vectors.base[name].is_floating_point()]
    total = sum(vectors.base[name].numel() for name in floats)
    keep = max(1, int(density * total))
    bins, beyond = _locate(_histograms(vectors, floats), torch.full((len(vectors.experts),), keep))
    lower, _ = _locate(_histograms(vectors, floats, within=bins), keep - beyond)
    return ((bins << 16) | lower).to(torch.int32).view(torch.float32)


def _histograms(vectors: TaskVectors, names: Iterable[str], within: Tensor | None = None) -> Tensor:
    """Return counts (T, 65536) of the magnitudes' upper 16 bits, or of the lower 16 of those `within` an upper bin."""
    counts = torch.zeros(len(vectors.experts), 1 << 16, dtype=torch.int64)
    for name in names:
        _count(vectors[name], counts, within)
    return counts


def _count(taus: Tensor, counts: Tensor, within: Tensor | None) -> None:
    for row, tau in enumerate(taus):
        bits = tau.abs().to(torch.float32).flatten().view(torch.int32)
        values = bits >> 16 if within is None else bits[bits >> 16 == within[row]] & 0xFFFF
        counts[row] += torch.bincount(values, minlength=1 << 16)


def _locate(counts: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of each row's keep-th largest value, and how many values lie in higher bins."""
    at_least = counts.flip(1).cumsum(1).flip(1)
    bins = (at_least >= keep[:, None]).sum(1) - 1
    return bins, (at_least.gather(1, bins[:, None]) - counts.gather(1, bins[:, None])).squeeze(1)
