"""Gain over the constant answer, and experts that are not above it: values worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.cells import answered, board_of, made_cell, write_made
from twin_bench.report.legend import legend
from twin_bench.results.board import Leaderboard
from twin_bench.results.cells import Cell
from twin_bench.results.scores import gain
from twin_bench.results.stored import analysed, load_leaderboard

LESS: Mapping[str, Any] = {"higher_is_better": False, "percent": False, "metric": "mse"}


def cells(task: str, scores: dict[str, float], **changes: Any) -> list[Cell]:
    return [made_cell(method, task, score, **changes) for method, score in scores.items()]


def analysis(found: list[Cell], folder: Path) -> Leaderboard:
    return analysed(board_of(found), folder, draws=2000)


def test_gain_is_the_share_of_the_way_from_the_floor_to_the_expert(tmp_path: Path) -> None:
    assert gain(70, 50, 90) == 50
    assert gain(40, 50, 90) == -25
    assert gain(2.5, 4, 2) == 75  # less is better
    found = [
        *cells("cola", {"experts": 90, "constant": 50, "average": 70, "ties": 40}),
        *cells("stsb", {"experts": 2, "constant": 4, "average": 2.5, "ties": 5}, stderr=0.01, **LESS),
    ]
    board = analysis(found, tmp_path)
    rows = board.cells.set_index(["method", "task"])
    assert rows["gain"].to_dict() == pytest.approx(
        {
            ("experts", "cola"): 100,
            ("constant", "cola"): 0,
            ("average", "cola"): 50,
            ("ties", "cola"): -25,
            ("experts", "stsb"): 100,
            ("constant", "stsb"): 0,
            ("average", "stsb"): 75,
            ("ties", "stsb"): -50,
        }
    )
    assert rows["floor"]["average"].to_dict() == {"cola": 50, "stsb": 4}
    table = board.summary.set_index("method")
    assert table["gain"].to_dict() == pytest.approx({"experts": 100, "constant": 0, "average": 62.5, "ties": -37.5})
    assert list(table.loc["experts", ["gain_ci_low", "gain_ci_high"]]) == [100, 100]
    assert list(table.loc["constant", ["gain_ci_low", "gain_ci_high"]]) == [0, 0]
    assert table["gain_ci_low"]["average"] < 62.5 < table["gain_ci_high"]["average"]
    assert table["normalized"]["average"] == pytest.approx((100 * 70 / 90 + 100 * 2 / 2.5) / 2)
    assert not board.tasks["weak"].any()


def test_a_weak_expert_has_no_gain_and_its_task_is_in_no_mean_of_gains(tmp_path: Path) -> None:
    found = [
        *cells("cola", {"experts": 90, "constant": 50, "average": 70}),
        *cells("rte", {"experts": 52, "constant": 50, "average": 51}),  # errors of 1: 2 is less than two times 1.41
        *cells("stsb", {"experts": 4.1, "constant": 4, "average": 3}, **LESS),
    ]
    board = analysis(found, tmp_path)
    assert dict(zip(board.tasks["task"], board.tasks["weak"], strict=True)) == {
        "cola": False,
        "rte": True,
        "stsb": True,
    }
    rows = board.cells.set_index(["method", "task"])
    assert [task for (_, task), value in rows["gain"].items() if value is None] == 3 * ["rte"] + 3 * ["stsb"]
    table = board.summary.set_index("method")
    assert table["gain"].to_dict() == pytest.approx({"experts": 100, "constant": 0, "average": 50})
    assert table["normalized"]["average"] == pytest.approx((100 * 70 / 90 + 100 * 51 / 52 + 100 * 4.1 / 3) / 3)
    (said,) = [paragraph for paragraph in legend(board) if "no gain" in paragraph]
    assert said.endswith("is not in the mean of gains: rte (standard), stsb (standard).")
    assert said.startswith("The expert is not above its floor by two standard errors")


def test_an_expert_that_is_three_errors_above_its_floor_is_not_weak(tmp_path: Path) -> None:
    board = analysis(cells("rte", {"experts": 54.3, "constant": 50, "average": 51}), tmp_path)
    assert not board.tasks["weak"].any()


def test_an_expert_is_compared_with_its_floor_on_the_same_rows(tmp_path: Path) -> None:
    """It is right on all rows of the constant answer, and on eight more: unpaired, 8 points would be one error."""
    targets = 50 * [0] + 50 * [1]
    scored = [
        answered("experts", "cola", targets, 50 * [0] + 8 * [1] + 42 * [0]),
        answered("constant", "cola", targets, 100 * [0]),
        answered("average", "cola", targets, 50 * [0] + 2 * [1] + 48 * [0]),
    ]
    write_made(scored, tmp_path)
    board = load_leaderboard(tmp_path)
    assert not board.tasks["weak"].any()
    assert board.summary.set_index("method")["gain"]["average"] == pytest.approx(25)


def test_without_a_floor_there_is_no_gain_and_all_else_stands(tmp_path: Path) -> None:
    found = [
        *cells("cola", {"experts": 80, "average": 60}),
        *cells("mnli", {"experts": 80, "average": 40, "constant": 30}),
    ]
    board = analysis(found, tmp_path)
    rows = board.cells.set_index(["method", "task"])
    assert (rows["gain"]["average", "cola"], rows["floor"]["average", "cola"]) == (None, None)
    assert rows["gain"]["average", "mnli"] == pytest.approx(20)
    table = board.summary.set_index("method")
    assert table["gain"]["average"] == pytest.approx(20)  # of the task that has a floor
    assert table["normalized"]["average"] == pytest.approx((75 + 50) / 2)
    alone = analysis(cells("cola", {"experts": 80, "average": 60}), tmp_path)
    assert alone.summary["gain"].isna().all()
    assert list(alone.summary["normalized"]) == [100, 75]
    assert not [said for said in legend(alone) if said.startswith("Floors")]
