"""Figures of a table that are made of scores: normalized, retention, gain, and their errors where rows are not kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.cells import board_of, made_cell
from twin_bench.results.cells import Cells, harnesses_in
from twin_bench.results.stored import analysed


def test_normalisation_keeps_negative_values_and_admits_a_worthless_expert(tmp_path: Path) -> None:
    scores = {("experts", "cola"): 50.0, ("average", "cola"): -5.0, ("experts", "stsb"): -1.0}
    cells = [
        made_cell(method, task, scores.get((method, task), 40.0))
        for method in ("experts", "average", "ties")
        for task in ("cola", "stsb", "mnli")
    ]
    board = analysed(board_of(cells), tmp_path)
    rows = board.cells.set_index(["method", "task"])["normalized"]
    assert rows["average", "cola"] == -10.0
    assert rows["average", "stsb"] is None
    assert rows["ties", "cola"] == 80.0
    table = board.summary.set_index("method")
    assert table.loc["average", "normalized"] == pytest.approx((-10 + 100) / 2)  # stsb's expert is left out
    # Errors of 1 in the score and in the expert's: of -5 / 50, and of 40 / 40. No rows are kept, so they are unpaired.
    cola, mnli = math.hypot(1 / 50, 5 / 50**2), math.hypot(1 / 40, 40 / 40**2)
    assert table.loc["average", "stderr"] == pytest.approx(100 * math.hypot(cola, mnli) / 2, rel=0.03)
    half = (table.loc["average", "ci_high"] - table.loc["average", "ci_low"]) / 2
    assert half == pytest.approx(1.96 * table.loc["average", "stderr"], rel=0.05)
    assert list(table.loc["experts", ["normalized", "ci_low", "ci_high", "stderr"]]) == [100, 100, 100, 0]


def test_less_is_better_turns_scores_round_and_every_method_has_the_same_tasks(tmp_path: Path) -> None:
    less = {"higher_is_better": False, "percent": False, "stderr": 0.01}
    cells = [
        *(made_cell("experts", task, 2.0, **less) for task in ("mse", "rmse")),
        *(made_cell("average", task, score, **less) for task, score in (("mse", 4.0), ("rmse", 8.0))),
        *(made_cell("ties", task, score, **less) for task, score in (("mse", 1.0), ("rmse", 0.0))),
        *(made_cell(one, "prose", score, expert=None, **less) for one, score in (("pretrained", 3.0), ("ties", 6.0))),
    ]
    board = analysed(board_of(cells), tmp_path)
    rows = {(row["method"], row["task"]): row for row in board.cells.to_dict("records")}
    assert rows["average", "mse"]["normalized"] == 50.0
    assert rows["ties", "mse"]["normalized"] == 200.0
    assert all(rows[method, "rmse"]["normalized"] is None for method in ("experts", "average", "ties"))
    assert (rows["ties", "prose"]["retention"], rows["ties", "prose"]["normalized"]) == (50.0, None)
    table = board.summary.set_index("method")
    assert table["normalized"]["average"] == 50.0
    error = 100 * math.hypot(0.01 / 4, 2 * 0.01 / 4**2)  # of 2 / 4, both with an error of 0.01
    assert table["stderr"]["average"] == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(
    ("score", "error", "fields"),
    [
        (20.0, 18.0, {}),
        (97.0, 8.0, {}),
        (150_000.0, 90_000.0, {"metric": "word_perplexity", "percent": False, "higher_is_better": False}),
    ],
    ids=["a low share", "a high share", "a perplexity"],
)
def test_a_score_without_rows_has_an_interval_within_its_range(
    tmp_path: Path, score: float, error: float, fields: dict[str, Any]
) -> None:
    board = analysed(board_of([made_cell("experts", "cola", score, stderr=error, **fields)]), tmp_path)
    (cell,) = board.cells.to_dict("records")
    assert 0 < cell["ci_low"] < score < cell["ci_high"]
    assert cell["ci_high"] < 100 or not cell["percent"]
    assert not board.tasks["paired"].any()


def test_other_harnesses_cells_in_a_directory_are_found(tmp_path: Path) -> None:
    Cells(tmp_path).write(made_cell(), None)
    assert harnesses_in(tmp_path) == ["lm-eval"]
    Cells(tmp_path, "helm").write(made_cell(), None)
    (tmp_path / "cells-empty").mkdir()
    assert sorted(harnesses_in(tmp_path)) == ["helm", "lm-eval"]
