"""The planner: it decides which rows of a request list share one fusion and which take the low-rank path.

There are two ways to run a row with fusion weights w. Both are exact.

- Fused weights: W_s + sum_t w_t v_t is built once for all rows with the same w. Those rows then cost what the plain
  model costs.
- Low-rank path: nothing is built. Each row's own w scales the products of the experts' factors. Every token costs more.

A group of rows is fused when the low-rank path would cost its tokens more than the fusion costs. The low-rank path
multiplies only the factors of the experts that the batch uses, so rows that use the same experts are run together.

A budget says what fits into memory (`twin_bench.twin.memory`). Rows are fused only where the fused copy of the weights
fits beside one of them, batches have no more rows than fit, and a row that does not fit alone is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twin_bench.twin.memory import Budget

Array = np.ndarray[Any, np.dtype[Any]]

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

    `mixes` says whether rows of the low-rank path can share a batch.
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
    mixes: bool = True

    def low_rank(self, used: Tensor) -> Tensor:
        """Return what the low-rank path adds to each row's tokens, (N,) float64. `used` is a bool mask (N, K)."""
        columns = used.double() @ torch.tensor(self.columns, dtype=torch.float64)
        return torch.where(used.any(dim=1), columns.clamp(max=self.joint).clamp(min=self.moved), 0.0)

    def fusing(self, used: Tensor) -> Tensor:
        """Return what a fusion of the experts in use takes, (N,) float64. `used` is a bool mask (N, K)."""
        added = used.double() @ torch.tensor(self.fuse, dtype=torch.float64)
        return (added + self.rebuild).clamp(min=self.fusion)

    def one_more(self, steps: int, *, fused: bool) -> float:
        """Return what one more batch of the same rows costs, in tokens. It generates `steps` tokens for each row."""
        least = self.plain if fused else self.by_row
        return (self.batch + least + steps * (self.step + least)) / self.token

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
    own weights. `crowded` says that a batch has no room beside the fused copy of the weights, which is freed before it.
    """

    rows: tuple[int, ...]
    weights: Tensor | None
    crowded: bool = False


def plan(
    weights: Tensor,
    tokens: Sequence[int] | Mapping[int, int],
    costs: Costs,
    *,
    rows: Sequence[int] | None = None,
    steps: int = 0,
    batch_size: int = 1,
    budget: Budget | None = None,
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
        budget: what fits into memory. None stands for everything.

    Returns:
        Groups that hold each row once. Fused groups come first, in the order of their weights. Low-rank groups
        whose rows use the same experts come next, and one group of all remaining rows comes last. The plan depends
        on the set of rows and not on their order.

    Raises:
        InputError: a row that does not fit.
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
    most_fused, most = _most_rows(chosen, tokens, member, len(unique), batch_size, budget)
    most = most if costs.mixes else most.clamp(max=1)
    own, shared = torch.ceil(count / most_fused), count / most.clamp(1, len(chosen))
    fused = costs.fusing(used) + costs.running(own, group_tokens, count, steps)
    worth_fusing = fused <= costs.running(shared, group_tokens, count, steps, costs.low_rank(used))
    worth_fusing = (worth_fusing | (most < 1)) & (most_fused > 0)
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


def _most_rows(
    rows: Sequence[int],
    tokens: Sequence[int] | Mapping[int, int],
    member: Tensor,
    groups: int,
    batch_size: int,
    budget: Budget | None,
) -> tuple[Tensor, Tensor]:
    """Return the most rows of a batch of each group, (groups,) float64 each: fused, and on the low-rank path.

    Args:
        rows: the rows that are grouped.
        tokens: each row's token count.
        member: (rows,), each row's group.
        groups: the number of groups.
        batch_size: the largest number of rows in a batch.
        budget: what fits.
    """
    whole = torch.full((groups,), float(batch_size), dtype=torch.float64)
    if budget is None:
        return whole, whole
    sizes, kind = np.unique([[tokens[row], budget.positions(row)] for row in rows], axis=0, return_inverse=True)
    lengths, positions = sizes.T
    budget.require(lengths, positions)
    each = (torch.from_numpy(budget.most(lengths, positions, fused=way)[kind.ravel()]) for way in (True, False))
    fused, by_row = (whole.scatter_reduce(0, member, most.clamp(min=0), "amin") for most in each)
    return fused, by_row


def _low_rank_groups(leftover: dict[tuple[bool, ...], list[int]], costs: Costs) -> list[Group]:
    """Return the groups of rows that are not fused: one for each set of few experts in use, and one of the rest.

    Where rows can't share a batch, each is a group.
    """
    if not costs.mixes:
        return [Group((row,), None) for row in sorted(row for rows in leftover.values() for row in rows)]
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
    costs: Costs,
    *,
    steps: int = 0,
    budget: Budget | None = None,
    weights: Tensor | None = None,
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
        budget: what fits into memory. A batch has no more rows than that, and at least one.
        weights: (N, K) fusion weights. A batch of the low-rank path then holds rows next to each other that use the
            same experts.
    """
    rows = sorted(group.rows, key=lambda row: (-tokens[row], row))
    lengths = np.array([tokens[row] for row in rows], dtype=np.float64)
    # In tokens, so that costs of equal batches are equal numbers.
    each = (costs.batch + steps * costs.step) / costs.token
    fused = group.weights is not None
    floor = (costs.plain if fused else costs.by_row) / costs.token
    needs = None if budget is None else _Needs.of(budget, rows, lengths, fused=fused)
    limits = needs if needs is not None and needs.limits(batch_size) else None
    least = np.zeros(len(rows) + 1)
    start_of = np.zeros(len(rows) + 1, dtype=int)
    for end in range(1, len(rows) + 1):
        starts = np.arange(max(0, end - batch_size), end)
        wide = end - starts
        forward = np.maximum(floor, wide * lengths[starts]) + steps * np.maximum(floor, wide)
        found = least[starts] + forward + each
        if limits is not None:
            found[:-1][~limits.fit(starts, end)[:-1]] = np.inf
        start_of[end] = starts[found.argmin()]
        least[end] = found.min()
    cut: list[Group] = []
    end = len(rows)
    used: dict[int, list[bool]] = {}
    if group.weights is None and weights is not None:
        used = dict(zip(rows, (weights.cpu()[rows] != 0).tolist(), strict=True))
    while end:
        start = start_of[end]
        crowded = needs is not None and needs.crowded(start, end)
        own = rows[start:end]
        cut.append(Group(tuple(sorted(own, key=used.__getitem__) if used else own), group.weights, crowded))
        end = start
    return cut[::-1]


@dataclass(frozen=True)
class _Needs:
    """What fits of rows that are cut into batches, longest rows first.

    `lengths` (N,) are the rows' lengths, and `asked` (N,) the number of each one's last positions whose logits are
    needed.
    """

    budget: Budget
    lengths: Array
    asked: Array
    fused: bool

    @classmethod
    def of(cls, budget: Budget, rows: Sequence[int], lengths: Array, *, fused: bool) -> _Needs:
        """Return the needs of rows, as the budget knows them."""
        return cls(budget, lengths, np.array([budget.positions(row) for row in rows], dtype=np.float64), fused)

    def limits(self, batch_size: int) -> bool:
        """Return whether some batch of so many rows may not fit."""
        most, longest = min(batch_size, len(self.lengths)), self.lengths.max(initial=1)
        positions = min(longest, most * self.asked.max(initial=0))
        return not self.budget.fits(most, longest, positions, fused=self.fused)

    def fit(self, starts: Array, end: int) -> Array:
        """Return whether the batches fit that begin at `starts`, one after the other, and all end before `end`."""
        return np.asarray(self.budget.fits(end - starts, *self._largest(starts, end), fused=self.fused))

    def crowded(self, start: int, end: int) -> bool:
        """Return whether a batch has no room beside the fused copy, which it does not need."""
        lengths, positions = self._largest(np.array([start]), end)
        needless = not self.fused or self.budget.use.shared
        return needless and self.budget.crowded(end - start, int(lengths[0]), int(positions[0]))

    def _largest(self, starts: Array, end: int) -> tuple[Array, Array]:
        """Return the lengths of batches, and the number of positions whose logits each computes for all of its rows.

        Rows of different lengths need those of each other as well.
        """
        own = slice(int(starts[0]), end)
        sums = self.asked[own][::-1].cumsum()[::-1]
        begun = np.minimum.accumulate((self.lengths - self.asked)[own][::-1])[::-1]
        return self.lengths[starts], np.minimum(sums, self.lengths[own] - begun)[starts - starts[0]]
