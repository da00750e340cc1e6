"""Scores made comparable across tasks: 100 is the expert's. Pure functions of scores, or of arrays of their draws."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from twin_bench.data.resampling import Array
from twin_bench.results.cells import Cell

Number = TypeVar("Number", float, Array)


def relative(score: Number, reference: Number, *, higher_is_better: bool) -> Number:
    """Return 100 * score / reference (equation 4 of the Twin-Merging paper), turned round where less is better."""
    return _share(score, reference) if higher_is_better else _share(reference, score)


def gain(score: Number, floor: Number, expert: Number) -> Number:
    """Return 100 * (score - floor) / (expert - floor): 0 for the constant answer, 100 for the expert."""
    return _share(score - floor, expert - floor)


def _share(part: Number, whole: Number) -> Number:
    """Return 100 * part / whole, NaN where that is not finite."""
    with np.errstate(all="ignore"):
        found = 100 * np.divide(part, whole)
        return np.where(np.isfinite(found), found, np.nan)[()]  # type: ignore[return-value]


def normalized_means(cells: Iterable[Cell]) -> dict[str, float]:
    """Return each method's mean over tasks of 100 * score / the expert's score; cells are of one protocol.

    The mean is over the tasks that have an expert and are comparable: NaN if there are none.
    """
    places = {(cell.method, cell.task): cell for cell in cells if cell.expert is not None}
    tasks = [
        task
        for task in dict.fromkeys(task for _, task in places)
        if is_comparable(places.get(("experts", task)), [cell for (_, t), cell in places.items() if t == task])
    ]
    found: dict[str, float] = {}
    for method in dict.fromkeys(method for method, _ in places):
        own = [(places.get((method, task)), places["experts", task]) for task in tasks]
        shares = [
            math.nan
            if cell is None
            else float(relative(cell.score, expert.score, higher_is_better=cell.higher_is_better))
            for cell, expert in own
        ]
        found[method] = math.fsum(shares) / len(shares) if shares else math.nan
    return found


def is_comparable(reference: Cell | None, cells: Iterable[Cell]) -> bool:
    """Whether a task's scores can be divided by their reference's, the expert's or the base model's.

    The reference must be above 0 and, where less is better, no method's score may be 0.
    """
    perfect = any(not cell.higher_is_better and cell.score <= 0 for cell in cells)
    return reference is not None and reference.score > 0 and not perfect
