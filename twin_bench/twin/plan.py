"""The planner: it decides which rows of a request list share one fusion and which take the low-rank path.

There are two ways to run a row with fusion weights w. Both are exact.

- Fused weights: W_s + sum_t w_t v_t is built once for all rows with the same w. Those rows then cost what the plain
  model costs.
- Low-rank path: nothing is built. Each row's own w scales the products of the experts' factors. Every token costs more.

A group of rows is fused when the low-rank path would cost its tokens more than the fusion costs. The low-rank path
multiplies only the factors of the experts that the batch uses, so rows that use the same experts are run together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BATCH_TOKENS = 32.0
"""The fixed cost of a batch on a CPU, in tokens. It was measured on two cores for a 6-layer, 384-wide encoder."""
GPU_BATCH_TOKENS = 8192.0
"""The fixed cost of a batch on a GPU, in tokens. Small batches leave a GPU idle; the number is a guess."""
STEP_TOKENS = 16
"""The least cost of one step of generation, in tokens of the plain forward: every step reads all weights once."""
EFFICIENT_ROWS = 32
"""A low-rank group of at least this many rows gets batches of its own."""


@dataclass(frozen=True)
class Costs:
    """The costs that the planner compares, in tokens of the plain model's forward.

    `fuse[k]` is the cost of adding expert k's factors to all weights once, and `rebuild` that of writing the fused
    weights. `columns[k]` is what the low-rank path adds to a token for every expert k in use. It adds at most `joint`.
    """

    fuse: tuple[float, ...]
    rebuild: float
    columns: tuple[float, ...]
    joint: float

    def low_rank(self, used: Tensor) -> Tensor:
        """Return what the low-rank path adds to each row's tokens, (N,) float64. `used` is a bool mask (N, K)."""
        return (used.double() @ torch.tensor(self.columns, dtype=torch.float64)).clamp(max=self.joint)


class Group(NamedTuple):
    """Rows that run together.

    `weights` (K,) are fused for all of them. Where it is None, each row takes the low-rank path with its own weights.
    """

    rows: tuple[int, ...]
    weights: Tensor | None


def plan(
    weights: Tensor,
    tokens: Sequence[int] | Mapping[int, int],
    costs: Costs,
    *,
    rows: Sequence[int] | None = None,
    steps: int = 0,
    batch_size: int = 1,
) -> list[Group]:
    """Group the rows of a request list.

    Args:
        weights: (N, K) fusion weights. Rows with equal weights are grouped.
        tokens: each row's token count, padding included.
        costs: what fusion and the low-rank path cost, with K entries in `fuse`.
        rows: the rows to group; by default all N.
        steps: the number of tokens to generate for each row.
        batch_size: the number of rows that are generated together. A step costs nearly the same for one row as for
            a full batch, so a group that does not fill its last batch wastes part of that batch's steps.

    Returns:
        Groups that hold each row once. Fused groups come first, in the order of their weights. Low-rank groups
        whose rows use the same experts come next, and one group of all remaining rows comes last. The plan depends
        on the set of rows and not on their order.
    """
    chosen = list(range(len(weights)) if rows is None else rows)
    if not chosen:
        return []
    weights = weights[chosen]
    if not weights.shape[1]:
        return [Group(tuple(chosen), weights[0])]
    found, member = torch.unique(weights.cpu(), dim=0, return_inverse=True)  # not every device can
    unique, used = found.to(weights.device), found != 0
    lengths = torch.tensor([tokens[row] for row in chosen], dtype=torch.float64)
    group_tokens = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, member, lengths)
    fusion = used.double() @ torch.tensor(costs.fuse, dtype=torch.float64) + costs.rebuild
    count = torch.bincount(member, minlength=len(unique)).to(torch.float64)
    wasted = (torch.ceil(count / batch_size) - count / batch_size) * steps * STEP_TOKENS
    worth_fusing = fusion + wasted <= (group_tokens + count * steps) * costs.low_rank(used)
    order = torch.argsort(member, stable=True)
    bounds = count.cumsum(0).long().tolist()
    groups: list[Group] = []
    leftover: dict[tuple[bool, ...], list[int]] = {}
    for index, (start, end) in enumerate(zip([0, *bounds], bounds, strict=False)):
        own = [chosen[place] for place in order[start:end].tolist()]
        if worth_fusing[index]:
            groups.append(Group(tuple(own), unique[index]))
        else:
            leftover.setdefault(tuple(used[index].tolist()), []).extend(own)
    return groups + _low_rank_groups(leftover, costs)


def _low_rank_groups(leftover: dict[tuple[bool, ...], list[int]], costs: Costs) -> list[Group]:
    """Return the groups of rows that are not fused: one for each set of few experts in use, and one of the rest."""
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
    """Cut a group into batches of at most `batch_size` rows, longest rows first, at the least cost.

    A batch costs its tokens, padding included, plus a fixed `overhead`, plus the steps of generation. A cut where the
    rows' length changes saves padding and costs one more batch. Dynamic programming finds the cheapest of all ways to
    cut the rows in order of their length.

    Args:
        group: the rows to cut, and the weights that each batch keeps.
        tokens: each row's token count.
        batch_size: the largest number of rows in a batch.
        steps: the number of tokens to generate for each row.
        overhead: the fixed cost of a batch, in tokens.
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
