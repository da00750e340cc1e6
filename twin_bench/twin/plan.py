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

import torch
from torch import Tensor


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


def batches(group: Group, tokens: Sequence[int] | Mapping[int, int], batch_size: int, *, steps: int = 0) -> list[Group]:
    """Cut a group into batches of at most `batch_size` rows, longest first, so that padding is least.

    A batch of EFFICIENT_TOKENS ends where the next row would be padded by more than a third of its length:
    a small group spans all lengths, and a batch cut by rows alone would be mostly padding. Where `steps` are to be
    generated padding is paid once, and every batch's steps: then it ends at a row that would be mostly padding.
    """
    cut: list[list[int]] = []
    waste = 4 / 3 if steps < EFFICIENT_STEPS else 4.0
    for row in sorted(group.rows, key=lambda row: (-tokens[row], row)):
        full = not cut or len(cut[-1]) == batch_size
        longest = 0 if full else tokens[cut[-1][0]]
        if full or (len(cut[-1]) * longest >= EFFICIENT_TOKENS and longest > waste * tokens[row]):
            cut.append([])
        cut[-1].append(row)
    return [Group(tuple(rows), group.weights) for rows in cut]


STEP_TOKENS = 16
"""What one step of generation costs at least, in tokens of the plain forward: the weights are read once."""

EFFICIENT_TOKENS = 512
"""Tokens from which on a batch runs at full speed."""
EFFICIENT_STEPS = 4
"""Steps of generation from which on they, and not the prompts, are what a batch costs."""
EFFICIENT_ROWS = 32
"""Rows from which on a low-rank group has batches of its own."""
