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

EFFICIENT_ROWS = 32
"""A low-rank group of at least this many rows gets batches of its own."""


@dataclass(frozen=True)
class Costs:
    """The costs that the planner compares, in seconds of the device.

    `token` is what a token takes in a large batch of the plain model. A batch takes at least `plain` seconds, and on
    the low-rank path `by_row`, however few tokens it has. So does a step of generation. Beside its tokens a batch takes
    `batch` seconds, and a step `step`.

    `fuse[k]` is the cost of adding expert k's factors to all weights once, and `rebuild` that of writing the fused
    weights. A fusion takes at least `fusion`. `columns[k]` is what the low-rank path adds to a token for every expert k
    in use. It adds at least `moved` and at most `joint`.
    """

    fuse: tuple[float, ...]
    rebuild: float
    columns: tuple[float, ...]
    joint: float
    token: float = 1.0
    batch: float = 0.0
    step: float = 0.0
    plain: float = 0.0
    by_row: float = 0.0
    fusion: float = 0.0
    moved: float = 0.0

    def low_rank(self, used: Tensor) -> Tensor:
        """Return what the low-rank path adds to each row's tokens, (N,) float64. `used` is a bool mask (N, K)."""
        columns = used.double() @ torch.tensor(self.columns, dtype=torch.float64)
        return torch.where(used.any(dim=1), columns.clamp(max=self.joint).clamp(min=self.moved), 0.0)

    def fusing(self, used: Tensor) -> Tensor:
        """Return what a fusion of the experts in use takes, (N,) float64. `used` is a bool mask (N, K)."""
        added = used.double() @ torch.tensor(self.fuse, dtype=torch.float64)
        return (added + self.rebuild).clamp(min=self.fusion)

    def running(self, batches: Tensor, tokens: Tensor, rows: Tensor, steps: int, extra: Tensor | None = None) -> Tensor:
        """Return what batches take, (N,) float64, beside `batch` for each.

        Args:
            batches: (N,), how many batches there are. A part of a batch counts as that part.
            tokens: (N,), the tokens in them.
            rows: (N,), the rows in them.
            steps: the number of tokens to generate for each row.
            extra: (N,), what the low-rank path adds to a token, or None for fused weights.
        """
        least = batches * (self.plain if extra is None else self.by_row)
        each = self.token + (0.0 if extra is None else extra)
        forward = torch.maximum(least, tokens * each)
        return forward + steps * (torch.maximum(least, rows * each) + batches * self.step)


class Group(NamedTuple):
    """Rows that run together.

    `weights` (K,), on the CPU, are fused for all of them. Where it is None, each row takes the low-rank path with its
    own weights.
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
        batch_size: the number of rows that run together. Rows of the low-rank path fill batches with other groups'
            rows. A group that is fused does not, so it may waste a part of its last batch.

    Returns:
        Groups that hold each row once. Fused groups come first, in the order of their weights. Low-rank groups
        whose rows use the same experts come next, and one group of all remaining rows comes last. The plan depends
        on the set of rows and not on their order.
    """
    chosen = list(range(len(weights)) if rows is None else rows)
    if not chosen:
        return []
    weights = weights.cpu()[chosen]
    if not weights.shape[1]:
        return [Group(tuple(chosen), weights[0])]
    unique, member = torch.unique(weights, dim=0, return_inverse=True)
    used = unique != 0
    lengths = torch.tensor([tokens[row] for row in chosen], dtype=torch.float64)
    group_tokens = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, member, lengths)
    count = torch.bincount(member, minlength=len(unique)).to(torch.float64)
    own, shared = torch.ceil(count / batch_size), count / min(batch_size, len(chosen))
    fused = costs.fusing(used) + costs.running(own, group_tokens, count, steps)
    worth_fusing = fused <= costs.running(shared, group_tokens, count, steps, costs.low_rank(used))
    order = torch.argsort(member, stable=True)
    bounds = count.cumsum(0).long().tolist()
    groups: list[Group] = []
    leftover: dict[tuple[bool, ...], list[int]] = {}
    for index, (start, end) in enumerate(zip([0, *bounds], bounds, strict=False)):
        members = [chosen[place] for place in order[start:end].tolist()]
        if worth_fusing[index]:
            groups.append(Group(tuple(members), unique[index]))
        else:
            leftover.setdefault(tuple(used[index].tolist()), []).extend(members)
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
    group: Group, tokens: Sequence[int] | Mapping[int, int], batch_size: int, costs: Costs, *, steps: int = 0
) -> list[Group]:
    """Cut a group into batches of at most `batch_size` rows, longest rows first, at the least cost.

    A batch costs its tokens, padding included, or the least time of a forward, and the fixed cost of a batch; and the
    steps of generation. A cut where the rows' length changes saves padding and makes one more batch. Dynamic
    programming finds the cheapest of all ways to cut the rows in order of their length.

    Args:
        group: the rows to cut, and the weights that each batch keeps.
        tokens: each row's token count.
        batch_size: the largest number of rows in a batch.
        costs: what a batch and a step cost.
        steps: the number of tokens to generate for each row.
    """
    rows = sorted(group.rows, key=lambda row: (-tokens[row], row))
    lengths = np.array([tokens[row] for row in rows], dtype=np.float64)
    # In tokens, so that costs of equal batches are equal numbers.
    each = (costs.batch + steps * costs.step) / costs.token
    floor = (costs.by_row if group.weights is None else costs.plain) / costs.token
    least = np.zeros(len(rows) + 1)
    start_of = np.zeros(len(rows) + 1, dtype=int)
    for end in range(1, len(rows) + 1):
        starts = np.arange(max(0, end - batch_size), end)
        wide = end - starts
        forward = np.maximum(floor, wide * lengths[starts]) + steps * np.maximum(floor, wide)
        found = least[starts] + forward + each
        start_of[end] = starts[found.argmin()]
        least[end] = found.min()
    cut: list[Group] = []
    end = len(rows)
    while end:
        cut.append(Group(tuple(rows[start_of[end] : end]), group.weights))
        end = start_of[end]
    return cut[::-1]
