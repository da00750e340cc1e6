"""TIES-Merging (Yadav et al., 2023): trim, elect sign, disjoint mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.task_vectors import TaskVectors


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
    thresholds = trim_thresholds(vectors, density)
    trimmed = vectors.map(lambda name, taus: trim(taus, thresholds))
    return trimmed.merged(lambda name, base, taus: base + scaling * disjoint_mean(taus))


def trim(taus: Tensor, thresholds: Tensor) -> Tensor:
    """Return (T, *shape) `taus`, changed in place: 0 for each expert's entries of a magnitude below its threshold."""
    for tau, threshold in zip(taus, thresholds, strict=True):
        tau.masked_fill_(tau.abs().to(torch.float32) < threshold, 0.0)
    return taus


def disjoint_mean(taus: Tensor) -> Tensor:
    """Return the mean over dim 0 of the entries whose sign is that of the sum; 0 where none is left.

    The other entries of `taus` become 0.
    """
    elected = taus.sum(dim=0).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tau in taus:  # one at a time: temporaries of all of them would double the memory
        agree = tau * elected > 0
        count += agree
        total += tau.masked_fill_(~agree, 0.0)
    return total.div_(count.clamp_(min=1))


def trim_thresholds(vectors: TaskVectors, density: float) -> Tensor:
    """Return, for each expert, the magnitude of its int(density * d)-th largest entry over the whole model.

    d counts the entries of `vectors`, which need not have the base's shapes. Where all are kept, the thresholds are 0.
    """
    if density == 1:
        return torch.zeros(len(vectors.experts))
    (thresholds,) = _order_statistics(vectors, torch.abs, lambda total: [max(1, int(density * total))])
    return thresholds


def kth_largest(vectors: TaskVectors, *ranks: int) -> list[Tensor]:
    """Return, for each of `ranks` (1 is the largest), that entry of each expert's whole model, (T,) in float32."""
    return _order_statistics(vectors, lambda entries: entries, lambda total: ranks)


def _order_statistics(
    vectors: TaskVectors, of: Callable[[Tensor], Tensor], ranks_of: Callable[[int], Sequence[int]]
) -> list[Tensor]:
    """Return `of` each expert's entries (T,) at the ranks that `ranks_of` names of their number; 0 of no entries.

    Two passes over the parameters and no copy of the model: the bit patterns of float32 numbers, those of
    negative ones flipped, are ordered as the numbers are, so a histogram of the upper 16 bits finds the
    entry's bin and one of the lower 16 bits its exact value.
    """
    upper = torch.zeros(len(vectors.experts), 1 << 16, dtype=torch.int64)
    for row, bits in _ordered_bits(vectors, of):
        upper[row] += torch.bincount((bits >> 16) + 0x8000, minlength=1 << 16)
    total = int(upper[0].sum())
    ranks = ranks_of(total)
    if not total:
        return [torch.zeros(len(upper)) for _ in ranks]
    located = [_locate(upper, torch.full((len(upper),), rank)) for rank in ranks]
    lower = torch.zeros(len(ranks), *upper.shape, dtype=torch.int64)
    for row, bits in _ordered_bits(vectors, of):
        for counts, (bins, _) in zip(lower, located, strict=True):
            inside = bits[(bits >> 16) + 0x8000 == bins[row]]
            counts[row] += torch.bincount(inside & 0xFFFF, minlength=1 << 16)
    entries = []
    for rank, counts, (bins, beyond) in zip(ranks, lower, located, strict=True):
        rest, _ = _locate(counts, rank - beyond)
        entries.append(_flip_negatives(((bins - 0x8000) << 16 | rest).to(torch.int32)).view(torch.float32))
    return entries


def _ordered_bits(vectors: TaskVectors, of: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert's row and `of` a parameter's entries, one expert's at a time, as integers in their order."""
    for name in vectors.floating():
        for row, entries in enumerate(vectors[name]):
            yield row, _flip_negatives(of(entries).to(torch.float32).flatten().view(torch.int32))
        del entries  # a view, which would hold these task vectors while the next ones are read


def _flip_negatives(bits: Tensor) -> Tensor:
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _locate(counts: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of each row's keep-th largest value, and how many values lie in higher bins."""
    at_least = counts.flip(1).cumsum(1).flip(1)
    bins = (at_least >= keep[:, None]).sum(1) - 1
    return bins, (at_least.gather(1, bins[:, None]) - counts.gather(1, bins[:, None])).squeeze(1)
