"""Two directories of results side by side: the same methods on the same rows, paired by the rows' identities."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from twin_bench.data.resampling import Array
from twin_bench.errors import InputError
from twin_bench.results.analysis import DRAWS, answers_of, drawn_rows, known_metric, metric_of
from twin_bench.results.cells import Cell
from twin_bench.results.samples import Samples, read_samples
from twin_bench.results.stored import load_leaderboard, read_board
from twin_bench.statistics.comparisons import difference, holm
from twin_bench.statistics.draws import score_draws

MEAN = "(mean)"
"""The task of a line that holds the mean over a method's tasks."""
COLUMNS = ("protocol", "method", "task", "rows", "first", "second", "difference", "ci_low", "ci_high", "p", "p_holm")


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str] | None = None,
    *,
    reference: str | None = None,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """Return paired comparisons, with 95% intervals and two-sided p, of one directory's methods or of two directories.

    With one directory: `Leaderboard.comparisons`, each method against the best of its field, `reference` and the
    constant answer, as differences of normalized means.

    With two: one line for each protocol, method and task that both hold, on the `rows` that both have scored: scores in
    points, means over the seeds where there are several, and the difference first - second. A line with the task
    "(mean)" holds the mean over those of a method's tasks whose scores are in points and of which more is better;
    p_holm is corrected over these lines of a protocol (Holm 1979).

    Args:
        first: a directory that `twin-bench leaderboard` wrote.
        second: another one, or None.
        reference: the label of a row, with one directory.
        draws: how many times the rows are drawn.

    Raises:
        InputError: no results, or no row that both have scored.
    """
    if second is None:
        return load_leaderboard(first, compare_to=reference, draws=draws).comparisons
    if reference is not None:
        raise InputError(f"reference {reference!r}: two directories are compared method by method; leave it out")
    found = [_scorable(Path(directory)) for directory in (first, second)]
    lines: list[dict[str, Any]] = []
    for protocol, method in dict.fromkeys(place[:2] for place in found[0] if place in found[1]):
        own = [place for place in found[0] if place[:2] == (protocol, method) and place in found[1]]
        pairs = [(place[2], _paired(found[0][place], found[1][place], draws)) for place in own]
        shared = {task: pair for task, pair in pairs if pair is not None}
        lines += [_line(protocol, method, task, pair) for task, pair in shared.items()]
        averaged = [pair for pair in shared.values() if pair.averaged]
        if len(averaged) > 1:
            lines.append(_line(protocol, method, MEAN, _mean(averaged)))
    if not lines:
        raise InputError(
            f"{first} and {second}: no method and task of both has rows in common; compare runs of one suite's rows"
        )
    return pd.DataFrame(_corrected(lines), columns=list(COLUMNS))


@dataclass(frozen=True)
class Pair:
    """Two cells on the `rows` that both have: their scores and draws, in points or in the metric's own unit.

    `drawn` is how many rows or clusters are drawn. `averaged` says that the score takes part in a mean over tasks: more
    is better, and it is in points.
    """

    rows: int
    scores: Sequence[float]
    draws: Sequence[Array]
    drawn: int
    averaged: bool = True


def _mean(pairs: Sequence[Pair]) -> Pair:
    scores = [math.fsum(pair.scores[side] for pair in pairs) / len(pairs) for side in (0, 1)]
    draws = [np.mean([pair.draws[side] for pair in pairs], axis=0) for side in (0, 1)]
    return Pair(sum(pair.rows for pair in pairs), scores, draws, min(pair.drawn for pair in pairs))


Seeds = list[tuple[Cell, Samples]]
"""The cells of one method on one task, one for each seed, with their samples."""


def _scorable(out: Path) -> dict[tuple[str, str, str], Seeds]:
    """Return the cells that have samples which make their score."""
    found: dict[tuple[str, str, str], Seeds] = {}
    for cell in read_board(out).cells:
        if cell.samples is not None:
            samples = read_samples(out / cell.samples)
            if samples.pooled is not None:
                found.setdefault((cell.protocol, cell.method, cell.task), []).append((cell, samples))
    return found


def _paired(first: Seeds, second: Seeds, draws: int) -> Pair | None:
    """Return two methods on the rows that both have, as means over their seeds.

    None if there are no such rows, or their metrics differ.
    """
    cell = first[0][0]
    kinds = {(one.metric, samples.pooled) for one, samples in (*first, *second)}
    common = set(first[0][1].identities).intersection(*(samples.identities for _, samples in (*first, *second)))
    if len(kinds) > 1 or not common:
        return None
    kept = [[samples.only(common) for _, samples in side] for side in (first, second)]
    metric, unit = metric_of(cell, kept[0][0]), 100.0 if cell.percent else 1.0
    answers = {f"{side} {seed}": answers_of(own) for side in (0, 1) for seed, own in enumerate(kept[side])}
    drawn = score_draws(None if metric is None else known_metric(metric), answers, draws=draws)
    return Pair(
        rows=len(kept[0][0].identities),
        scores=[unit * math.fsum(own.score(cell.metric) for own in side) / len(side) for side in kept],
        draws=[unit * np.mean([drawn[f"{side} {seed}"] for seed in range(len(kept[side]))], axis=0) for side in (0, 1)],
        drawn=drawn_rows(kept[0][0]),
        averaged=cell.percent and cell.higher_is_better,
    )


def _line(protocol: str, method: str, task: str, pair: Pair) -> dict[str, Any]:
    found = difference(pair.draws[0], pair.draws[1], pair.scores[0], pair.scores[1], rows=pair.drawn)
    return {
        "protocol": protocol,
        "method": method,
        "task": task,
        "rows": pair.rows,
        "first": pair.scores[0],
        "second": pair.scores[1],
        "difference": found.difference,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
        "p": found.p,
    }


def _corrected(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines with p_holm: of the means over tasks, or of single tasks for methods that share one alone."""
    several = {(line["protocol"], line["method"]) for line in lines if line["task"] == MEAN}
    whole = [
        index
        for index, line in enumerate(lines)
        if line["task"] == MEAN or (line["protocol"], line["method"]) not in several
    ]
    adjusted: dict[int, float] = {}
    for protocol in dict.fromkeys(line["protocol"] for line in lines):
        own = [index for index in whole if lines[index]["protocol"] == protocol]
        adjusted |= dict(zip(own, holm([lines[index]["p"] for index in own]).tolist(), strict=True))
    return [{**line, "p_holm": adjusted.get(index)} for index, line in enumerate(lines)]
