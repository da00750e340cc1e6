"""From cells and samples to figures that decide: intervals, normalized means, gains, ranks and comparisons.

One bootstrap serves everything: in each draw the same rows of a task are drawn for every method, the experts and the
floor. So a normalized mean carries the uncertainty of its denominators, and a difference is one on the same rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from twin_bench.data.metric import Metric
from twin_bench.data.metrics import find_metric
from twin_bench.data.resampling import Array
from twin_bench.errors import InputError
from twin_bench.files import digest
from twin_bench.results.cells import Cell
from twin_bench.results.samples import Samples, read_samples
from twin_bench.results.scores import gain, is_comparable, relative
from twin_bench.statistics.draws import Answers, score_draws
from twin_bench.statistics.intervals import percentile, wilson

DRAWS = 10_000
FLOOR, EXPERTS, BASE = "constant", "experts", "pretrained"
ACCURACY = re.compile(r"acc|exact|em\b|.*match|pass|correct")
"""The beginnings of the names of scores that are shares of right rows, where each row's score is 0 or 1."""
WEAK = 2
"""An expert that is not above its floor by so many standard errors is weak: its task has no gain."""


@dataclass(frozen=True)
class Scored:
    """One method on one task under one protocol: its cells, one for each seed, and the score's draws (draws,).

    Score and draws are in points, or in the metric's own unit where it is no fraction. `rows` is how many rows are
    drawn, or how many clusters of them. `paired` says that the draws are those of all methods.
    """

    cells: tuple[Cell, ...]
    draws: Array
    low: float
    high: float
    rows: int
    paired: bool

    @property
    def first(self) -> Cell:
        """The first seed's cell."""
        return self.cells[0]

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return math.fsum(cell.score for cell in self.cells) / len(self.cells)


Place = tuple[str, str, str]
"""A protocol, a method and a task."""


def scored_cells(cells: Iterable[Cell], directory: Path, draws: int = DRAWS) -> dict[Place, Scored]:
    """Return each place's score with its draws and interval. Samples are read from `directory`.

    A score that the harness alone can make of its rows, or that has no samples, has draws of a normal distribution with
    its standard error, which are its own and not shared: what is said of it is unpaired.
    """
    places: dict[Place, list[Cell]] = {}
    for cell in cells:
        places.setdefault((cell.protocol, cell.method, cell.task), []).append(cell)
    files = {cell.samples: cell for own in places.values() for cell in own if cell.samples is not None}
    samples = {file: _read(directory / file, cell) for file, cell in files.items()}
    drawn: dict[str, Array] = {}
    for task in dict.fromkeys(cell.task for cell in files.values()):
        own = {file: samples[file] for file, cell in files.items() if cell.task == task}
        if not all(one.pooled for one in own.values()):  # the mean of nothing but zeros may be the score by chance
            continue
        for metric in dict.fromkeys(metric_of(files[file], found) for file, found in own.items()):
            group = {f: answers_of(s) for f, s in own.items() if metric_of(files[f], s) == metric}
            drawn |= score_draws(None if metric is None else known_metric(metric), group, draws=draws)
    return {place: _scored(own, drawn, samples, draws) for place, own in places.items()}


def known_metric(metric: str) -> Metric:
    """Return the metric of a name. InputError with the remedy for a plugin's that is not loaded."""
    try:
        return find_metric(metric)
    except InputError as error:
        raise InputError(f"{error}; if it is a plugin's, name the plugin: --plugin FILE") from None


def _read(file: Path, cell: Cell) -> Samples:
    """Read a cell's samples. InputError if they do not make the cell's score."""
    samples = read_samples(file)
    if samples.pooled is not None:
        if samples.pooled == "metric":
            known_metric(cell.metric)
        score = _unit(cell) * samples.score(cell.metric)
        if not math.isclose(score, cell.score, rel_tol=1e-6, abs_tol=1e-6):
            raise InputError(
                f"{file}: the rows make {cell.metric} {score:.6g}, and the cell of {cell.method} on {cell.task} has "
                f"{cell.score:.6g}; remove this file and run the leaderboard again"
            )
    return samples


def metric_of(cell: Cell, samples: Samples) -> str | None:
    """Return the metric that makes the score of all rows, or None if the score is a mean of the rows' own."""
    return cell.metric if samples.pooled == "metric" else None


def answers_of(samples: Samples) -> Answers:
    """Return samples as the bootstrap takes them."""
    by_metric = samples.pooled == "metric"
    # Rows of equal texts are told apart by what they expect, which a metric's answers say themselves.
    asked = zip(samples.identities, samples.targets, strict=True)
    return Answers(
        identities=samples.identities if by_metric else [f"{identity} {target}" for identity, target in asked],
        targets=np.asarray(samples.targets) if by_metric else None,
        predictions=np.asarray(samples.predictions) if by_metric else None,
        scores=np.asarray(samples.scores, dtype=np.float64),
        clusters=samples.clusters,
    )


def drawn_rows(samples: Samples) -> int:
    """Return how many rows are drawn in each draw, or how many clusters of them."""
    return len(samples.identities) if samples.clusters is None else len(set(samples.clusters))


def _scored(cells: Sequence[Cell], drawn: Mapping[str, Array], samples: Mapping[str, Samples], draws: int) -> Scored:
    """Return a place's score. Several seeds' draws are averaged."""
    own = [_draws_of(cell, drawn, samples, draws) for cell in cells]
    mean = own[0] if len(own) == 1 else np.mean(own, axis=0)
    found = samples.get(cells[0].samples or "")
    rows = cells[0].n if found is None else drawn_rows(found)
    paired = all(cell.samples in drawn for cell in cells)
    if len(cells) == 1 and found is not None and _is_accuracy(cells[0], found):
        low, high = wilson(round(math.fsum(found.scores)), len(found.scores))
        unit = _unit(cells[0])
        return Scored(tuple(cells), mean, unit * low, unit * high, rows, paired)
    return Scored(tuple(cells), mean, *percentile(mean, rows=rows), rows, paired)


def _is_accuracy(cell: Cell, samples: Samples) -> bool:
    """Whether a score is a share of right rows, and rows are independent."""
    return samples.clusters is None and (
        cell.metric == "acc"
        if samples.pooled == "metric"
        else ACCURACY.match(cell.metric) is not None and set(samples.scores) <= {0.0, 1.0}
    )


def _draws_of(cell: Cell, drawn: Mapping[str, Array], samples: Mapping[str, Samples], draws: int) -> Array:
    if cell.samples is not None and cell.samples in drawn:
        return _unit(cell) * drawn[cell.samples]
    if cell.stderr is None:
        return np.full(draws, math.nan)
    seed = int(digest(["unpaired", cell.key])[:16], 16)
    return _unpaired(cell, np.random.default_rng(seed).standard_normal(draws))


def _unpaired(cell: Cell, normal: Array) -> Array:
    """Return draws of a score from its standard error and standard normal draws.

    A fraction stays between 0 and 100: its log odds are normal. A score of which less is better stays above 0: its
    logarithm is normal. Any other score is normal.
    """
    score, error = cell.score, cell.stderr or 0.0
    if cell.percent and 0 < score < 100:
        share = score / 100
        odds = math.log(share / (1 - share)) + error / 100 / (share * (1 - share)) * normal
        return np.asarray(100 / (1 + np.exp(-odds)))
    if not cell.higher_is_better and score > 0:
        return np.asarray(score * np.exp(error / score * normal))
    return np.asarray(score + error * normal)


def _unit(cell: Cell) -> float:
    return 100.0 if cell.percent else 1.0


def cell_lines(scored: Mapping[Place, Scored], tasks: pd.DataFrame) -> pd.DataFrame:
    """Return one line a place: the cell's fields, interval, normalized or retention, gain and seeds."""
    known = {(line["protocol"], line["task"]): line for line in tasks.to_dict("records")}
    lines = []
    for place, one in scored.items():
        cell, task = one.first, known[place[0], place[2]]
        share = _relative(scored, place) if task["comparable"] else math.nan
        owned = cell.expert is not None
        lines.append(
            {
                **asdict(cell),
                "score": one.score,
                "ci_low": one.low,
                "ci_high": one.high,
                "stderr": _mean([own.stderr for own in one.cells]),
                "normalized": _or_none(share) if owned else None,
                "retention": None if owned else _or_none(share),
                "gain": None
                if task["weak"] or not owned
                else _or_none(gain(one.score, task["floor"], task["expert_score"])),
                "floor": _or_none(task["floor"]),
                "seeds": len(one.cells),
                "seed_numbers": [own.seed for own in one.cells],
                "seed_scores": [own.score for own in one.cells],
                "seed_samples": [own.samples for own in one.cells],
                "seed_spread": float(np.std([own.score for own in one.cells], ddof=1)) if len(one.cells) > 1 else None,
                "model_seconds_per_row": None if cell.model_seconds is None else cell.model_seconds / cell.n,
            }
        )
    return pd.DataFrame(lines).astype(object).where(lambda frame: frame.notna(), None)


def _relative(scored: Mapping[Place, Scored], place: Place) -> float:
    one = scored[place]
    reference = scored.get((place[0], BASE if one.first.expert is None else EXPERTS, place[2]))
    if reference is None:
        return math.nan
    return float(relative(one.score, reference.score, higher_is_better=one.first.higher_is_better))


def task_lines(scored: Mapping[Place, Scored]) -> pd.DataFrame:
    """Return one line a protocol and task: floor, reference, and whether scores are `comparable` and the expert `weak`.

    Scores are comparable with their reference, the expert or the base model, if it is above 0 and, where less is
    better, no method's score is 0.
    """
    lines = []
    for protocol, task in dict.fromkeys((place[0], place[2]) for place in scored):
        own = {method: one for (p, method, t), one in scored.items() if (p, t) == (protocol, task)}
        cell = next(iter(own.values())).first
        expert, floor = own.get(EXPERTS), own.get(FLOOR)
        reference = expert if cell.expert is not None else own.get(BASE)
        samples = next((one.first.notes for one in own.values() if "chance" in one.first.notes), {})
        lines.append(
            {
                "protocol": protocol,
                "task": task,
                "metric": cell.metric,
                "expert": cell.expert,
                "higher_is_better": cell.higher_is_better,
                "floor": math.nan if floor is None else floor.score,
                "expert_score": math.nan if expert is None or cell.expert is None else expert.score,
                "comparable": is_comparable(
                    None if reference is None else reference.first, [one.first for one in own.values()]
                ),
                "weak": cell.expert is not None and floor is not None and expert is not None and _weak(expert, floor),
                "chance": samples.get("chance", math.nan),
                "rows": max(one.first.n for one in own.values()),
                "paired": all(one.paired for one in own.values()),
            }
        )
    return pd.DataFrame(lines)


def _weak(expert: Scored, floor: Scored) -> bool:
    """Whether an expert is not above its floor by WEAK standard errors of their difference, if that has an error."""
    sign = 1 if expert.first.higher_is_better else -1
    drawn = expert.draws - floor.draws
    known = drawn[np.isfinite(drawn)]
    spread = float(np.std(known)) if len(known) else 0.0
    return not sign * (expert.score - floor.score) > WEAK * spread


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None
