"""A joint bootstrap: the scores of all methods on a task in the same draws of its rows (Efron 1979)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from twin_bench.data import resampling
from twin_bench.data.metric import Metric
from twin_bench.data.resampling import Array, OfDraws
from twin_bench.errors import InputError, first_line, shown

DRAWS = 10_000
FEWER_DRAWS = 1_000
"""The draws of a metric that has no form for all draws at once: it is called for each draw and each method."""
_WEIGHTS = 2**16
"""How many weights of rows are held at once: they fit a processor's cache."""


@dataclass(frozen=True)
class Answers:
    """One method's answers to a task's rows, in any order.

    `identities` (n,) are strings: digests of the rows' inputs, the same for all methods. `scores` (n,) are the rows'
    scores. `targets` (n,) and `predictions`, (n,) or (n, labels), are what the task's metric takes; None where the
    task's score is the mean of the rows' scores. `clusters` (n,) are strings, the rows' sources, where several rows
    share one.
    """

    identities: Sequence[str] | Array
    scores: Sequence[float] | Array
    targets: Sequence[float] | Array | None = None
    predictions: Sequence[Any] | Array | None = None
    clusters: Sequence[str] | Array | None = None


def score_draws(
    metric: Metric | None, answers: Mapping[str, Answers], *, seed: int = 0, draws: int = DRAWS
) -> dict[str, Array]:
    """Return each method's score on a task in each draw of the task's rows, (draws,).

    A draw is of as many rows as the methods have between them, with replacement; with clusters, of as many clusters,
    each with all its rows. The same draws serve every method, so that a difference between two methods is of the same
    rows. Rows are matched by identity. Rows of one identity are told apart by their order by target. A method that
    lacks a row is scored on what it has of a draw.

    The draws depend on `seed` and on the rows' identities alone: not on the rows' order, nor on which other methods
    there are, if these have the same rows.

    Scores are the metric's own values, before these become points: an accuracy is from 0 to 1. Without a metric, a
    score is the mean of the rows' scores. A draw in which the metric is undefined gives NaN. A metric without a form
    for all draws at once is called for 1,000 draws, and these are repeated in order to fill `draws`. That is valid
    beside the draws of other tasks, which are independent of these.

    Raises InputError for a method without rows, arrays of different lengths, a metric without targets or predictions, a
    row in two clusters, and what the metric does not take.
    """
    if not answers:
        return {}
    arranged = {name: _arranged(name, own) for name, own in answers.items()}
    rows = np.unique(np.concatenate([*{own.keys.tobytes(): own.keys for own in arranged.values()}.values()]))
    source = _sources(rows, arranged)
    groups: dict[tuple[Any, ...], dict[str, _Arranged]] = {}
    for name, own in arranged.items():
        groups.setdefault(own.scored_with(metric), {})[name] = own
    scored = [(tuple(group), _places(group, rows), _of_draws(metric, group)) for group in groups.values()]
    wanted = draws if metric is None or metric.resampled is not None else min(draws, FEWER_DRAWS)
    found: dict[str, list[Array]] = {name: [] for name in answers}
    # A method may lack all rows of a draw. Threads wait longer for each other than such small products take.
    with np.errstate(divide="ignore", invalid="ignore"), threadpool_limits(1, "blas"):
        for weights in _weights(rows, source, seed, wanted):
            for names, places, of_draws in scored:
                for name, values in zip(names, of_draws(weights[places]), strict=True):
                    found[name].append(values)
    return {name: np.resize(np.concatenate(parts), draws) for name, parts in found.items()}


@dataclass(frozen=True)
class _Arranged:
    """A method's answers in the order of their rows' keys: identities, numbered where several rows have the same."""

    keys: Array
    scores: Array
    targets: Array | None
    predictions: Array | None
    clusters: Array | None

    def scored_with(self, metric: Metric | None) -> tuple[Any, ...]:
        """Return what methods have in common that are scored at once: rows, targets, and the shape of predictions."""
        if metric is None or self.targets is None or self.predictions is None:
            return (self.keys.tobytes(),)
        return self.keys.tobytes(), self.targets.tobytes(), self.predictions.shape[1:]


def _arranged(name: str, own: Answers) -> _Arranged:
    identities = np.asarray(own.identities, dtype=str)
    numbers = {"scores": own.scores, "targets": own.targets, "predictions": own.predictions}
    try:
        arrays = {what: None if part is None else np.asarray(part, dtype=np.float64) for what, part in numbers.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: scores, targets and predictions must be numbers ({first_line(error)})") from None
    arrays["clusters"] = None if own.clusters is None else np.asarray(own.clusters, dtype=str)
    given = {what: array for what, array in arrays.items() if array is not None}
    for what, array in given.items():
        if len(identities) == 0 or len(array) != len(identities):
            raise InputError(f"{name} has {len(identities)} identities and {len(array)} {what}; each row needs both")
    # Equal rows are sorted by all there is, so that the order in which they came does not matter.
    columns = [given[what] for what in ("predictions", "scores", "clusters", "targets") if what in given]
    order = np.lexsort([*(key for column in columns for key in np.atleast_2d(column.T)), identities])
    identities, place = identities[order], np.arange(len(identities))
    first = np.append(True, identities[1:] != identities[:-1])
    occurrence = place - np.maximum.accumulate(np.where(first, place, 0))
    if occurrence.any():
        numbered = zip(identities.tolist(), occurrence.tolist(), strict=True)
        identities = np.asarray([f"{identity}\0{k}" if k else identity for identity, k in numbered])
    scores, targets, predictions, clusters = (None if array is None else array[order] for array in arrays.values())
    assert scores is not None
    return _Arranged(identities, scores, targets, predictions, clusters)


def _places(group: Mapping[str, _Arranged], rows: Array) -> Array | slice:
    """Return where a group's rows are among all rows."""
    keys = next(iter(group.values())).keys
    return slice(None) if np.array_equal(keys, rows) else np.searchsorted(rows, keys)


def _sources(rows: Array, arranged: Mapping[str, _Arranged]) -> Array | None:
    """Return the number of each row's cluster, (rows,), or None without clusters. A row without one is its own."""
    clusters: dict[str, str] = {}
    for name, own in arranged.items():
        if own.clusters is None:
            continue
        for key, cluster in zip(own.keys.tolist(), own.clusters.tolist(), strict=True):
            other = clusters.setdefault(key, cluster)
            if other != cluster:
                found = f"a row's cluster is {shown(cluster)} for {name} and {shown(other)} for another method"
                raise InputError(f"{found}; score all methods on the same version of the task")
    if not clusters:
        return None
    return np.unique([clusters.get(key, f"\0{key}") for key in rows.tolist()], return_inverse=True)[1]


def _of_draws(metric: Metric | None, group: Mapping[str, _Arranged]) -> OfDraws:
    """Return the function that scores the methods of a group in draws of their rows."""
    if metric is None:
        return resampling.mean(np.stack([own.scores for own in group.values()]))
    predictions = []
    for name, own in group.items():
        if own.targets is None or own.predictions is None:
            raise InputError(f"{name} has no targets or no predictions; {metric.name} is a metric of both")
        targets = own.targets
        predictions.append(own.predictions)
    return metric.over_draws(targets, predictions)


def _weights(rows: Array, source: Array | None, seed: int, draws: int) -> Iterator[Array]:
    """Yield how often each row is in each draw, (rows, some draws), until there are enough draws."""
    digest = hashlib.sha256("\n".join([str(seed), *rows.tolist()]).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest))
    units = len(rows) if source is None else int(source.max()) + 1
    size = max(8, _WEIGHTS // len(rows))
    for start in range(0, draws, size):
        count = min(size, draws - start)
        drawn = rng.integers(0, units, (count, units), dtype=np.int32)
        cells = drawn * count + np.arange(count, dtype=np.int32)[:, None]
        weights = np.bincount(cells.ravel(), minlength=units * count).reshape(units, count).astype(np.float64)
        yield weights if source is None else weights[source]
