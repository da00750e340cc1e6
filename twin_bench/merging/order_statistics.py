"""The k-th largest entry of a whole model, found without a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from twin_bench.merging.task_vectors import TaskVectors


def kth_largest(vectors: TaskVectors, *ranks: int) -> list[Tensor]:
    """Return, for each of `ranks` (1 is the largest), that entry of each expert's whole model: (T,) in float32."""
    return order_statistics(vectors, lambda entries: entries, lambda total: ranks)


def order_statistics(
    vectors: TaskVectors, of: Callable[[Tensor], Tensor], ranks_of: Callable[[int], Sequence[int]]
) -> list[Tensor]:
    """Return, for each rank, that entry of each expert's whole model: (T,) in float32, where the task vectors are.

    `of` is applied to the entries first. `ranks_of` returns the ranks (1 is the largest) from the number of entries.
    Without entries every result is 0.

    The search takes two passes over the parameters and no copy of the model. The bit patterns of float32 numbers are
    ordered as the numbers are, if those of negative numbers are flipped. A histogram of the upper 16 bits finds the
    entry's bin, and a histogram of the lower 16 bits finds its exact value.
    """
    upper = torch.zeros(len(vectors.experts), 1 << 16, dtype=torch.int64)
    for row, bits in _ordered_bits(vectors, of):
        upper[row] += torch.bincount((bits >> 16) + 0x8000, minlength=1 << 16).cpu()
        device = bits.device
    total = int(upper[0].sum())
    ranks = ranks_of(total)
    if not total:
        return [torch.zeros(len(upper)) for _ in ranks]
    located = [_locate(upper, torch.full((len(upper),), rank)) for rank in ranks]
    lower = torch.zeros(len(ranks), *upper.shape, dtype=torch.int64)
    for row, bits in _ordered_bits(vectors, of):
        for counts, (bins, _) in zip(lower, located, strict=True):
            inside = bits[(bits >> 16) + 0x8000 == bins[row]]
            counts[row] += torch.bincount(inside & 0xFFFF, minlength=1 << 16).cpu()
    entries = []
    for rank, counts, (bins, beyond) in zip(ranks, lower, located, strict=True):
        rest, _ = _locate(counts, rank - beyond)
        found = _flip_negatives(((bins - 0x8000) << 16 | rest).to(torch.int32)).view(torch.float32)
        entries.append(found.to(device))
    return entries


def _ordered_bits(vectors: TaskVectors, of: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield an expert's row and `of` its entries of one parameter, as integers in the entries' order."""
    for name in vectors.floating():
        for row, entries in enumerate(vectors[name]):
            yield row, _flip_negatives(of(entries).to(torch.float32).flatten().view(torch.int32))
        del entries  # a view, which would keep these task vectors in memory while the next ones are read


def _flip_negatives(bits: Tensor) -> Tensor:
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _locate(counts: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of each row's keep-th largest value, and how many values lie in higher bins."""
    at_least = counts.flip(1).cumsum(1).flip(1)
    bins = (at_least >= keep[:, None]).sum(1) - 1
    return bins, (at_least.gather(1, bins[:, None]) - counts.gather(1, bins[:, None])).squeeze(1)
