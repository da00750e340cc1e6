"""The planner: which rows of a request list share one fusion, and which take the low-rank path.

Two ways to run a row with weights w, both exact:

- fused weights: W_s + sum_t w_t v_t is built once for all rows with the same w, which then cost what the
  plain model costs;
- low-rank path: nothing is built, each row's own w scales the factors' products, at an extra cost a token.

A group of rows is worth its fusion when its tokens would pay more for the low-rank path than the fusion costs. The
low-rank path multiplies the factors of those experts alone that its batch uses: rows that use the same ones run
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BATCH_TOKENS = 32.0
"""What a batch costs besides its tokens, in tokens: measured on two cores for a 6-layer, 384-wide encoder."""
GPU_BATCH_TOKENS = 8192.0
"""The same on a GPU, which small batches leave idle; a guess."""
STEP_TOKENS = 16
"""What one step of generation costs at least, in tokens of the plain forward: the weights are read once."""
EFFICIENT_ROWS = 32
"""Rows from which on a low-rank group has batches of its own."""


@dataclass(frozen=True)
class Costs:
    """Costs in tokens of the plain model's forward.

    `fuse[k]`: adding expert k's factors to all weights once; `rebuild`: writing the fused weights at all. What the
    low-rank path adds to each token: `columns[k]` for every expert k in use, or at most `joint`.
    """

    fuse: tuple[float, ...]
    rebuild: float
    columns: tuple[float, ...]
    joint: float

    def low_rank(self, used: Tensor) -> Tensor:
        """Return what the low-rank path adds to a token of rows that use some experts, (N,) of a mask (N, K)."""
        return (used.double() @ torch.tensor(self.columns, dtype=torch.float64)).clamp(max=self.joint)


class Group(NamedTuple):
    """Rows to run together: with fused `weights` (K,), or, where that is None, each row on the low-rank path."""

    rows: tuple[int, ...]
    weights: Tensor | None


def plan(weights: Tensor, tokens: Sequence[int], costs: Costs, *, steps: int = 0, batch_size: int = 1) -> list[Group]:
    """Group the rows of a request list.

    Args:
        weights: (N, K) fusion weights; rows are grouped when they are equal.
        tokens: N token counts, padding included.
        costs: see `Costs`; K entries in `fuse`.
        steps: tokens to be generated for each row, in batches of
        batch_size: rows. A step's cost hardly depends on how many rows it has, so a group that does not fill
            its last batch wastes some.

    Returns:
        Groups that hold each row once. Fused groups come first, in the order of their weights, so that the
        plan depends on the set of rows and not on their order; then the low-rank groups, of rows that use the same
        experts, and last the one of all rows that are left.
    """
    if not len(tokens):
        return []
    if not weights.shape[1]:
        return [Group(tuple(range(len(tokens))), weights[0])]
    unique, member = torch.unique(weights, dim=0, return_inverse=True)
    used, member = (unique != 0).cpu(), member.cpu()
    lengths = torch.as_tensor(tokens, dtype=torch.float64)
    group_tokens = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, member, lengths)
    fusion = used.double() @ torch.tensor(costs.fuse, dtype=torch.float64) + costs.rebuild
    rows = torch.bincount(member, minlength=len(unique)).to(torch.float64)
    wasted = (torch.ceil(rows / batch_size) - rows / batch_size) * steps * STEP_TOKENS
    worth_fusing = fusion + wasted <= (group_tokens + rows * steps) * costs.low_rank(used)
    order = torch.argsort(member, stable=True)
    bounds = rows.cumsum(0).long().tolist()
    groups: list[Group] = []
    leftover: dict[tuple[bool, ...], list[int]] = {}
    for index, (start, end) in enumerate(zip([0, *bounds], bounds, strict=False)):
        own = order[start:end].tolist()
        if worth_fusing[index]:
            groups.append(Group(tuple(own), unique[index]))
        else:
            leftover.setdefault(tuple(used[index].tolist()), []).extend(own)
    return groups + _low_rank_groups(leftover, costs)


def _low_rank_groups(leftover: dict[tuple[bool, ...], list[int]], costs: Costs) -> list[Group]:
    """Return the groups of rows that no fusion is worth: those that use the same few experts, and the rest."""
    groups: list[Group] = []
    rest: list[int] = []
    for experts, rows in sorted(leftover.items()):
        apart = len(rows) >= EFFICIENT_ROWS and costs.low_rank(torch.tensor([experts])) < costs.joint
        if apart:
            groups.append(Group(tuple(sorted(rows)), None))
        else:
            rest += rows
    return groups + ([Group(tuple(sorted(rest)), None)] if rest else [])


def batches(
    group: Group,
    tokens: Sequence[int] | Mapping[int, int],
    batch_size: int,
    *,
    steps: int = 0,
    overhead: float = BATCH_TOKENS,
) -> list[Group]:
    """Cut a group into batches of at most `batch_size` rows, longest first, at the least cost.

    A batch costs its tokens, padding included, and an `overhead`; where `steps` are to be generated, these as well.
    Cutting where rows are of another length saves padding and costs another batch: of all ways to cut the rows in
    order of their length, the cheapest is found by dynamic programming.
    """
    rows = sorted(group.rows, key=lambda row: (-tokens[row], row))
    lengths = np.array([tokens[row] for row in rows], dtype=np.float64)
    each = overhead + steps * STEP_TOKENS
    least = np.zeros(len(rows) + 1)
    start_of = np.zeros(len(rows) + 1, dtype=int)
    for end in range(1, len(rows) + 1):
        starts = np.arange(max(0, end - batch_size), end)
        costs = least[starts] + (end - starts) * lengths[starts] + each
        start_of[end] = starts[costs.argmin()]
        least[end] = costs.min()
    cut: list[Group] = []
    end = len(rows)
    while end:
        cut.append(Group(tuple(rows[start_of[end] : end]), group.weights))
        end = start_of[end]
    return cut[::-1]
