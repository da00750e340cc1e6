"""One line a method: normalized mean and gain with intervals, ranks, tie groups, costs; and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from twin_bench.data.resampling import Array
from twin_bench.errors import InputError, nearest
from twin_bench.results.analysis import BASE, EXPERTS, FLOOR, Place, Scored
from twin_bench.results.cells import Cell
from twin_bench.results.scores import gain, relative
from twin_bench.statistics.comparisons import difference, holm, rank_ranges, tie_groups
from twin_bench.statistics.intervals import effective_rows, percentile

COMPARISON_COLUMNS = (
    "protocol",
    "method",
    "against",
    "reason",
    "difference",
    "ci_low",
    "ci_high",
    "p",
    "p_holm",
    "sure",
)
SIGNIFICANT = 0.05
"""A method is told apart from another where p, corrected by Holm, is below this."""
Ranks = Mapping[tuple[str, str], tuple[int, int, int]]
"""A protocol and a method to its best rank, its worst rank and its tie group. Methods without a mean have none."""


@dataclass(frozen=True)
class Mean:
    """A mean over tasks in points, with its draws (draws,), NaN if the method lacks a task or there is none.

    `rows` is of how many rows (or clusters) the mean is: see `effective_rows`.
    """

    value: float
    draws: Array
    rows: float = 0


@dataclass(frozen=True)
class Line:
    """A method under a protocol: its cells on each task, and its means over the tasks."""

    protocol: str
    method: str
    cells: Mapping[str, Scored]
    normalized: Mean
    gain: Mean
    retention: Mean
    bound: bool
    told_the_task: bool

    @property
    def first(self) -> Cell:
        """The first task's cell."""
        return next(iter(self.cells.values())).first

    @property
    def ranked(self) -> bool:
        """Whether the method takes part in the ranking."""
        return not self.bound and math.isfinite(self.normalized.value)


def lines_of(scored: Mapping[Place, Scored], tasks: pd.DataFrame) -> list[Line]:
    """Return the table's lines in order.

    `tasks` is what `task_lines` returns. The normalized mean is over the tasks that have an expert and are comparable,
    the mean of gains over those whose expert is not weak and that have a floor, and retention over those that are
    nobody's. They are the same tasks for every method of a protocol.
    """
    places: dict[tuple[str, str], dict[str, Scored]] = {}
    for (protocol, method, task), one in scored.items():
        places.setdefault((protocol, method), {})[task] = one
    lines = []
    for (protocol, method), own in places.items():
        known = [line for line in tasks.to_dict("records") if line["protocol"] == protocol]
        reference = {task: scored.get((protocol, EXPERTS, task)) for task in own}
        base = {task: scored.get((protocol, BASE, task)) for task in own}
        floor = {task: scored.get((protocol, FLOOR, task)) for task in own}
        owned = [line["task"] for line in known if line["expert"] is not None and line["comparable"]]
        gained = [
            line["task"]
            for line in known
            if line["expert"] is not None and not line["weak"] and math.isfinite(line["floor"])
        ]
        nobodys = [line["task"] for line in known if line["expert"] is None and line["comparable"]]
        first = next(iter(own.values())).first
        lines.append(
            Line(
                protocol,
                method,
                own,
                normalized=_mean([_relative(own.get(task), reference.get(task)) for task in owned]),
                gain=_mean([_gain(own.get(task), floor.get(task), reference.get(task)) for task in gained]),
                retention=_mean([_relative(own.get(task), base.get(task)) for task in nobodys]),
                bound=first.track == "bound",
                told_the_task=first.track == "task-id given",
            )
        )
    return lines


def _relative(one: Scored | None, reference: Scored | None) -> Mean | None:
    if one is None or reference is None:
        return None
    better = one.first.higher_is_better
    return Mean(
        float(relative(one.score, reference.score, higher_is_better=better)),
        relative(one.draws, reference.draws, higher_is_better=better),
        one.rows,
    )


def _gain(one: Scored | None, floor: Scored | None, expert: Scored | None) -> Mean | None:
    if one is None or floor is None or expert is None:
        return None
    drawn = gain(one.draws, floor.draws, expert.draws)
    return Mean(float(gain(one.score, floor.score, expert.score)), drawn, one.rows)


def _mean(parts: Sequence[Mean | None]) -> Mean:
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return Mean(math.nan, np.full(1, math.nan))
    value = math.fsum(part.value for part in known) / len(known)
    draws = np.mean([part.draws for part in known], axis=0)
    return Mean(
        value, draws, effective_rows([spread(part.draws) ** 2 for part in known], [part.rows for part in known])
    )


def summary_frame(lines: Sequence[Line], ranks: Ranks) -> pd.DataFrame:
    """Return one line a protocol and method: means with 95% intervals, ranks, tie groups and costs.

    Methods that are told the task are ranked among themselves, and all others among themselves. A rank's range holds
    all ranks that the rows allow, for all methods at once at 95%. Methods of one tie group can't be told apart from its
    first.
    """
    found = []
    for line in lines:
        low, high = percentile(line.normalized.draws, rows=line.normalized.rows)
        gain_low, gain_high = percentile(line.gain.draws, rows=line.gain.rows)
        retention_low, retention_high = percentile(line.retention.draws, rows=line.retention.rows)
        best, worst, group = ranks.get((line.protocol, line.method), (math.nan,) * 3)
        found.append(
            {
                "protocol": line.protocol,
                "method": line.method,
                "track": line.first.track,
                "bound": line.bound,
                "told_the_task": line.told_the_task,
                "normalized": line.normalized.value,
                "ci_low": low,
                "ci_high": high,
                "stderr": spread(line.normalized.draws),
                "gain": line.gain.value,
                "gain_ci_low": gain_low,
                "gain_ci_high": gain_high,
                "retention": line.retention.value,
                "retention_ci_low": retention_low,
                "retention_ci_high": retention_high,
                "rank_low": best,
                "rank_high": worst,
                "tie_group": group,
                **_costs(line, lines),
            }
        )
    return pd.DataFrame(found)


def spread(draws: Array) -> float:
    """Return the standard deviation of draws without those far out, where a denominator was near 0: NaN of none.

    It is that of a normal distribution whose middle 68% is as wide as the draws'.
    """
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return math.nan
    low, high = np.quantile(finite, [0.158655, 0.841345])
    return float(high - low) / 2


def ranks_of(lines: Sequence[Line]) -> Ranks:
    """Return the ranks and tie groups of the methods that are ranked with each other."""
    found: dict[tuple[str, str], tuple[int, int, int]] = {}
    for field in _fields(lines):
        values = np.array([line.normalized.value for line in field])
        draws = np.column_stack([line.normalized.draws for line in field])
        rows = min(line.normalized.rows for line in field)
        ranges, groups = rank_ranges(values, draws, rows=rows), tie_groups(values, draws, rows=rows)
        for line, span, group in zip(field, ranges, groups, strict=True):
            if span is not None and group is not None:
                found[line.protocol, line.method] = *span, group
    return found


def _fields(lines: Sequence[Line]) -> list[list[Line]]:
    """Return the lines that are ranked with each other."""
    fields: dict[tuple[str, bool], list[Line]] = {}
    for line in lines:
        if line.ranked:
            fields.setdefault((line.protocol, line.told_the_task), []).append(line)
    return list(fields.values())


def _costs(line: Line, lines: Sequence[Line]) -> dict[str, Any]:
    """Return a line's costs. The model's time is shown if all of a protocol's models were timed in one run."""
    cell = line.first
    own = [cell for one in line.cells.values() for cell in one.cells]
    peers = [other.first.measured for other in lines if other.protocol == line.protocol and other.method == BASE]
    timed = all(one.model_seconds is not None and [one.measured] == peers for one in own)
    rows = sum(one.n for one in own)
    return {
        "parameters": cell.parameters,
        "stored_bytes": cell.stored_bytes,
        "relative_storage": cell.relative_storage,
        "build_seconds": cell.build_seconds,
        "build_peak_bytes": cell.build_peak_bytes,
        "model_seconds_per_row": sum(one.model_seconds or 0 for one in own) / rows if timed else math.nan,
    }


def comparisons_frame(lines: Sequence[Line], ranks: Ranks, compare_to: str | None = None) -> pd.DataFrame:
    """Return each method's difference from the best of its field, from a reference and from the constant answer.

    Differences are of normalized means, in points, on the same draws of the same rows. p is two-sided, and p_holm is
    corrected for all comparisons of a protocol with the same method (Holm 1979). `sure` says that a method is told
    apart: from the best by the simultaneous comparisons that make tie groups, else by p_holm below 0.05.

    Raises InputError if no method is labelled `compare_to`.
    """
    found: list[dict[str, Any]] = []
    labels = {line.method for line in lines}
    if compare_to is not None and compare_to not in labels:
        raise InputError(f"--compare-to {compare_to}: no such row{nearest(compare_to, sorted(labels))}")
    for field in _fields(lines):
        best = max(field, key=lambda line: line.normalized.value)
        tied = {method for (protocol, method), (*_, group) in ranks.items() if (protocol, group) == (best.protocol, 1)}
        found += [{**one, "sure": one["method"] not in tied} for one in _against(field, best, "best")]
    for reason, label in (("reference", compare_to), ("constant", FLOOR)):
        for protocol in dict.fromkeys(line.protocol for line in lines):
            ranked = [line for line in lines if line.protocol == protocol and line.ranked]
            other = next((line for line in lines if (line.protocol, line.method) == (protocol, label)), None)
            if other is not None:
                found += _against(ranked, other, reason)
    return pd.DataFrame(found, columns=list(COMPARISON_COLUMNS))


def _against(field: Sequence[Line], other: Line, reason: str) -> list[dict[str, Any]]:
    if not math.isfinite(other.normalized.value):
        return []
    compared = [line for line in field if line.method != other.method]
    means = [(line.normalized, other.normalized) for line in compared]
    found = [difference(own.draws, ref.draws, own.value, ref.value, rows=min(own.rows, ref.rows)) for own, ref in means]
    corrected = holm([one.p for one in found]).tolist()
    return [
        {
            "protocol": line.protocol,
            "method": line.method,
            "against": other.method,
            "reason": reason,
            "difference": one.difference,
            "ci_low": one.ci_low,
            "ci_high": one.ci_high,
            "p": one.p,
            "p_holm": adjusted,
            "sure": adjusted < SIGNIFICANT,
        }
        for line, one, adjusted in zip(compared, found, corrected, strict=True)
    ]
