"""What a model answered to each row of a task, from what lm-eval logs of a task's documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import singledispatch
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.task import Task as LmEvalTask

from twin_bench.data.classification import Classification
from twin_bench.data.generative import GenerativeTask
from twin_bench.data.metrics import mean
from twin_bench.data.named import NamedTask
from twin_bench.data.task import Task
from twin_bench.files import digest
from twin_bench.results.samples import Samples
from twin_bench_lm_eval.base import ServedTwin
from twin_bench_lm_eval.named import Loaded, expected, scored_options

IDENTITY = 32
"""The number of hexadecimal digits of a row's identity."""


class Logged(NamedTuple):
    """A document of a leaf task as lm-eval logs it: `row` has its filtered answers and its value of each metric."""

    name: str
    leaf: LmEvalTask
    row: Mapping[str, Any]


def samples_of(
    task: Task, loaded: Loaded, logged: Mapping[str, Sequence[Mapping[str, Any]]], served: ServedTwin, score: float
) -> Samples:
    """Return a task's rows with their answers, in the order of scoring: leaf task after leaf task.

    Args:
        task: the task, whose metric may have a filter's name after a comma.
        loaded: what lm-eval ran for it.
        logged: lm-eval's samples of each leaf task.
        served: the model that answered.
        score: what lm-eval says that the task's score is.
    """
    metric, _, kind = task.metric.partition(",")
    rows = [
        Logged(name, leaf, row)
        for name, leaf in loaded.tasks.items()
        for row in logged[name]
        if row["filter"] == (kind or "none")
    ]
    found = _samples(task, rows, metric, score)
    return replace(found, weights=_weights(rows, served), texts=[row["arguments"][0][0] for _, _, row in rows])


def _weights(rows: Sequence[Logged], served: ServedTwin) -> dict[str, list[float]]:
    """Return each expert's fusion weights. A document that nothing was asked of has none, which is NaN."""
    names = () if served.twin.routing == "none" else served.twin.expert_names
    unknown = (math.nan,) * len(names)
    own = [served.fusion_weights.get((leaf.task_name, row["doc_id"])) or unknown for _, leaf, row in rows]
    return {name: [weights[place] for weights in own] for place, name in enumerate(names)}


@singledispatch
def _samples(task: Task, rows: Sequence[Logged], metric: str, score: float) -> Samples:
    """Return rows with their answers, without weights and texts."""
    raise TypeError(f"{type(task).__name__} does not say what its rows' answers are")


@_samples.register
def _(task: Classification, rows: Sequence[Logged], metric: str, score: float) -> Samples:
    targets, answers, clusters = zip(*(row[metric] for _, _, row in rows), strict=True)
    return Samples(
        identities=[_identity(row["doc"]["text"], row["doc"]["text_pair"]) for _, _, row in rows],
        predictions=answers,
        targets=targets,
        scores=[task.row_score(answer, target) for target, answer in zip(targets, answers, strict=True)],
        pooled="metric",
        clusters=None if task.cluster is None else clusters,
    )


@_samples.register
def _(task: GenerativeTask, rows: Sequence[Logged], metric: str, score: float) -> Samples:
    return Samples(
        identities=[_identity(row["doc"]["question"]) for _, _, row in rows],
        predictions=[row["filtered_resps"][0].strip() for _, _, row in rows],
        targets=[row["doc"]["answer"] for _, _, row in rows],
        scores=[row[metric] for _, _, row in rows],
        pooled="mean",
        clusters=None if task.cluster is None else [row["doc"]["cluster"] for _, _, row in rows],
    )


@_samples.register
def _(task: NamedTask, rows: Sequence[Logged], metric: str, score: float) -> Samples:
    values = [row.get(metric) for _, _, row in rows]
    scores = [float(value) if isinstance(value, Real) else math.nan for value in values]
    pooled = math.isclose(mean(scores), score, rel_tol=1e-9, abs_tol=1e-9)  # not of NaN
    return Samples(
        identities=[_identity(name, row["doc_hash"]) for name, _, row in rows],
        predictions=_alike([_prediction(leaf, row, metric) for _, leaf, row in rows]),
        targets=_alike([expected(leaf, row["doc"]) for _, leaf, row in rows]),
        scores=scores,
        pooled="mean" if pooled else None,
    )


def _identity(*parts: str | None) -> str:
    """Return the digest of a row's input."""
    return digest(parts)[:IDENTITY]


def _prediction(leaf: LmEvalTask, row: Mapping[str, Any], metric: str) -> Any:
    """Return a text, the index of the option that the metric takes, or a log-likelihood."""
    found = row["filtered_resps"]
    if leaf.OUTPUT_TYPE == "multiple_choice":
        return int(np.argmax(scored_options(leaf, row["doc"], [answer[0] for answer in found], metric)))
    first = found[0]
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return float(first) if isinstance(first, Real) else str(first)


def _alike(values: Sequence[Any]) -> list[Any]:
    """Return values of one type, as a file's column has: whole numbers, numbers, or else texts."""
    for kind in (int, float):
        if all(isinstance(value, kind) for value in values):
            return [kind(value) for value in values]
    return [str(value) for value in values]
