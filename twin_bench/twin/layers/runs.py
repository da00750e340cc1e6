"""Rows that use few experts: an expert's columns are multiplied by the rows alone that use it.

A batch as a whole multiplies the columns of all experts that some row uses. Where each row uses few of them, it is
cheaper to take each expert's rows, a run of neighbouring ones at a time. The planner puts rows next to each other that
use the same experts. Many small products are cheap to start on a CPU alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from twin_bench.twin.layers.factored import FactoredLayer

START = {4: 1e6, 2: 5e7}
"""What starting a run's products costs, in multiplications, by a number's bytes: 10 and 100 microseconds of a CPU.

Half precision multiplies faster, and prepares each product for longer. Measured on one core, for widths of 768 to 4096.
"""
WORTHWHILE = 0.7
"""Run by run is chosen if it takes at most this fraction of the batch's multiplications: small products are slower."""


class Run(NamedTuple):
    """Neighbouring tokens of a batch whose rows use an expert, and the weight that it has in each, (tokens, 1)."""

    tokens: slice
    expert: int
    scale: Tensor


def by_run(layer: FactoredLayer, x: Tensor) -> list[Run] | None:
    """Return the runs of a batch x (batch, ..., in) if a layer multiplies it run by run, else None."""
    fusion, known = layer.fusion, layer.fusion.known_weights
    if x.device.type != "cpu" or torch.compiler.is_compiling() or known is None or torch.is_grad_enabled():
        return None
    tokens, side = x.shape[:-1].numel(), sum(layer.weight.shape)
    columns = None if layer.basis is None else layer.basis.down.shape[1]

    start = START.get(layer.weight.itemsize, START[4])

    def choose() -> bool:
        rows = (known != 0).sum(dim=0).tolist()
        whole: float = tokens * side * sum(rank for rank, own in zip(layer.ranks, rows, strict=True) if own)
        each = tokens / len(known) * side * sum(rank * own for rank, own in zip(layer.ranks, rows, strict=True))
        if columns is not None:
            whole, each = min(whole, tokens * layer.joint_cost()), each + columns * sum(layer.ranks) * side
        return each <= WORTHWHILE * whole and each + start * len(_spans(known)) <= WORTHWHILE * whole

    def make() -> list[Run]:
        each = tokens // len(known)
        scale = fusion.cast(layer.A if layer.basis is None else layer.basis.down).repeat_interleave(each, dim=0)
        spans = ((slice(a * each, b * each), expert) for expert, a, b in _spans(known))
        return [Run(span, expert, scale[span, expert : expert + 1]) for span, expert in spans]

    if not fusion.chosen(("by run", layer.ranks, layer.weight.shape, columns, tokens), choose):
        return None
    return fusion.chosen(("runs", layer.weight.dtype, tokens), make)


def add_runs(y: Tensor, x: Tensor, layer: FactoredLayer, runs: list[Run]) -> None:
    """Add the outputs of the rows' exclusive vectors to y (batch, ..., out) in place, for x (batch, ..., in)."""
    down, up = layer.fusion.kept(layer, "whole factors", lambda: layer.input_first(*layer.factors()))
    into, out = down.split(layer.ranks, dim=1), up.split(layer.ranks)
    flat, total = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for tokens, expert, scale in runs:
        if layer.ranks[expert]:
            total[tokens].addmm_((flat[tokens] @ into[expert]).mul_(scale), out[expert])


def _spans(weights: Tensor) -> list[tuple[int, int, int]]:
    """Return each expert with the first row of each run of rows that use it, and the row after its last one."""
    used = (weights != 0).int()
    edges = torch.diff(torch.nn.functional.pad(used, (0, 0, 1, 1)), dim=0).T
    begins, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [(expert, begin, end) for (expert, begin), (_, end) in zip(begins, ends, strict=True)]
