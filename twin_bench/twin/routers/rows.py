"""The training rows of a router, and what each of them is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twin_bench.data.task import TaskInput
from twin_bench.errors import InputError


class Divided(NamedTuple):
    """Training rows of a router, and masks (rows,) of those that it is not fitted on.

    `choosing` rows decide its layer, epoch, temperature and threshold. `reporting` rows decide nothing: what is told
    about the router is measured on them. Where a task has too few rows, both are the same rows.
    """

    rows: Sequence[TaskInput]
    choosing: Tensor
    reporting: Tensor

    @property
    def held_out(self) -> Tensor:
        """The mask (rows,) of all rows that the router is not fitted on."""
        return self.choosing | self.reporting

    @property
    def reported_on(self) -> str:
        """What the reporting rows are, in words."""
        apart = not (self.choosing & self.reporting).any()
        return "other held-out training rows" if apart else "the rows that it was chosen on"

    def fitted(self, names: Sequence[str]) -> list[int]:
        """Return the number of rows of each expert on which the router is fitted."""
        counts = Counter(row.task for row, out in zip(self.rows, self.held_out.tolist(), strict=True) if not out)
        return [counts[name] for name in names]


def divided(rows: Sequence[TaskInput], names: Sequence[str], *, limit: int, held_out: float, seed: int) -> Divided:
    """Return a random sample of at most `limit` rows of each task, and what they are for.

    A fraction `held_out` of each task's rows is held out (see `held_out_rows`). Half of them choose, and the other half
    reports.

    Raises:
        InputError: A task has fewer than two rows.
    """
    sample = _sampled(rows, names, limit, seed)
    out = held_out_rows(sample, names, held_out, seed)
    rank = _ranks(sample, seed)
    choosing = torch.zeros(len(sample), dtype=torch.bool)
    for name in names:
        own = sorted((rank[_text(row)], i) for i, row in enumerate(sample) if row.task == name and out[i])
        cut = own[(len(own) + 1) // 2 - 1][0]
        choosing[[i for position, i in own if position <= cut]] = True
        if own[-1][0] == cut:  # one text is held out, or copies of one
            return Divided(sample, out, out)
    return Divided(sample, choosing, out & ~choosing)


def held_out_rows(rows: Sequence[TaskInput], names: Sequence[str], fraction: float, seed: int) -> Tensor:
    """Return a mask (rows,) of the rows that are held out of training.

    A fraction of each task's rows is held out, and at least one row. Rows with equal texts are all held out or all
    trained on, so that the router is not chosen on rows that it was trained on.

    Raises:
        InputError: A task has fewer than two rows.
    """
    require_two(rows, names, "router")
    rank = _ranks(rows, seed)
    mask = torch.zeros(len(rows), dtype=torch.bool)
    for name in names:
        own = sorted((rank[_text(row)], i) for i, row in enumerate(rows) if row.task == name)
        cut = own[max(1, int(fraction * len(own))) - 1][0]
        mask[[i for position, i in own if position <= cut]] = True
    return mask


def require_two(rows: Sequence[TaskInput], names: Sequence[str], where: str) -> None:
    """Raise an InputError that begins with `where` if a task has fewer than two rows: one of them is held out."""
    counts = Counter(row.task for row in rows)
    for name in names:
        if counts[name] < 2:
            raise InputError(f"{where}: expert {name!r} has {counts[name]} rows; it needs two, one of them held out")


def _text(row: TaskInput) -> tuple[str, str]:
    return row.text, row.text_pair or ""


def _ranks(rows: Sequence[TaskInput], seed: int) -> dict[tuple[str, str], int]:
    """Return the place of each distinct text in a random order."""
    texts = sorted(set(map(_text, rows)))
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return dict(zip(texts, shuffled, strict=True))


def _sampled(rows: Sequence[TaskInput], names: Sequence[str], limit: int, seed: int) -> list[TaskInput]:
    """Return a random sample of at most `limit` rows of each task."""
    generator = torch.Generator().manual_seed(seed)
    sample: list[TaskInput] = []
    for name in names:
        own = [row for row in rows if row.task == name]
        sample += [own[index] for index in torch.randperm(len(own), generator=generator)[:limit].tolist()]
    return sample
