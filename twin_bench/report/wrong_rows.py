"""The rows that each cell of a leaderboard got wrong, beside a reference's predictions, in few bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

ROWS = 100
"""How many rows of a cell are kept at most."""
LETTERS = 300
"""How much of a text is kept."""
Place = tuple[str, str, str]
"""A cell's protocol, method and task."""


@dataclass(frozen=True)
class _Wrong:
    """A cell's rows: the identity, prediction, reference's prediction and score of each, and how many there are."""

    reference: str | None
    count: int
    graded: str
    rows: Sequence[tuple[str, str, str | None, float]]


@dataclass
class WrongRows:
    """What was answered wrongly, cell by cell. Rows of a task and equal answers are held once."""

    _cells: dict[Place, _Wrong] = field(default_factory=dict)
    _details: dict[str, dict[str, tuple[str, str | None]]] = field(default_factory=dict)

    def add(self, place: Place, frame: pd.DataFrame, reference: str | None, others: Mapping[str, Any]) -> None:
        """Take a cell's samples in. `others` are the predictions of the method `reference`, by the rows' identity."""
        wrong, graded = _wrong(frame)
        shown = frame.iloc[wrong[:ROWS]]
        details = self._details.setdefault(place[2], {})
        texts = shown["text"] if "text" in shown else [None] * len(shown)
        rows = []
        columns = (shown["identity"], shown["target"], shown["prediction"], shown["score"], texts)
        for identity, target, prediction, score, text in zip(*columns, strict=True):
            if details.get(identity, (None, None))[1] is None:
                details[identity] = written(target), None if text is None else cut(str(text))
            other = written(others[identity]) if identity in others else None
            rows.append((str(identity), written(prediction), other, float(score)))
        self._cells[place] = _Wrong(reference, len(wrong), graded, rows)

    def compact(self, rows: int) -> dict[str, Any]:
        """Return plain data with at most `rows` rows of each cell.

        `tasks` has for each task the `rows` that occur, [identity, target, text or None], and the `answers` that
        occur. `cells` are in the order in which they were added: reference, how many rows are wrong, what the
        rows' scores are if there is more than right and wrong, and the rows: [row, answer, the reference's answer or
        -1, score].
        """
        tasks: dict[str, dict[str, Any]] = {}
        numbers: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
        cells = []
        for (_, _, task), wrong in self._cells.items():
            known, answers = numbers.setdefault(task, ({}, {}))
            listed = [
                [
                    known.setdefault(identity, len(known)),
                    answers.setdefault(prediction, len(answers)),
                    -1 if other is None else answers.setdefault(other, len(answers)),
                    *([round(score, 3) if math.isfinite(score) else None] if wrong.graded else []),
                ]
                for identity, prediction, other, score in wrong.rows[:rows]
            ]
            cells.append({"against": wrong.reference, "wrong": wrong.count, "graded": wrong.graded, "rows": listed})
        for task, (known, answers) in numbers.items():
            details = self._details[task]
            tasks[task] = {"rows": [[one[:16], *details[one]] for one in known], "answers": list(answers)}
        return {"tasks": tasks, "cells": cells}

    def places(self) -> dict[Place, int]:
        """Return where each cell stands among the cells of `compact`."""
        return {place: number for number, place in enumerate(self._cells)}


def _wrong(frame: pd.DataFrame) -> tuple[list[int], str]:
    """Return the positions of the rows that are wrong, and what their scores are: empty if right or wrong is all.

    Wrong is a score below 1. Where scores lie between, the worst rows come first. Squared errors are such scores too,
    and there the largest is the worst.
    """
    scores = frame["score"].to_numpy(dtype=float)
    if _squared_errors(frame, scores):
        return [int(row) for row in np.argsort(-scores, kind="stable") if scores[row] > 0], "squared error"
    if np.isin(scores, (0.0, 1.0)).all():
        return [int(row) for row in np.flatnonzero(scores == 0)], ""
    return [int(row) for row in np.argsort(scores, kind="stable") if scores[row] < 1], "score"


def _squared_errors(frame: pd.DataFrame, scores: np.ndarray) -> bool:
    try:
        answers, targets = (frame[column].to_numpy(dtype=float) for column in ("prediction", "target"))
    except (TypeError, ValueError):  # texts, or lists of probabilities
        return False
    return bool(np.allclose((answers - targets) ** 2, scores, rtol=1e-3, atol=1e-6))


def written(value: Any) -> str:
    """Return a prediction or a target as a short text."""
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, list | tuple | np.ndarray):
        return cut(", ".join(written(one) for one in value))
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    return cut(str(value))


def cut(text: str) -> str:
    """Return a text of at most LETTERS letters, the last of which is an ellipsis where something is missing."""
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
