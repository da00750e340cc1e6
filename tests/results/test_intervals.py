"""Intervals of scores and means: known values, a second bootstrap, and that the order of rows changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.cells import Scored, answered, write_made
from twin_bench.results.board import Leaderboard
from twin_bench.results.stored import load_leaderboard

SKILLS = {"pretrained": 0.5, "experts": 0.9, "constant": None, "average": 0.75, "ties": 0.72}
TASKS = {"cola": 80, "mnli": 60}


def drawn(seed: int = 0, metrics: tuple[str, ...] = ("mcc", "acc")) -> list[Scored]:
    """Return five methods' answers to two tasks' rows, right with a chance of their own; some rows are hard for all."""
    found = []
    for (task, rows), metric in zip(TASKS.items(), metrics, strict=True):
        draw = np.random.default_rng([seed, rows])
        targets, hard = draw.integers(0, 2 + (task == "mnli"), rows), draw.random(rows)
        for method, skill in SKILLS.items():
            right = 0.5 * hard + 0.5 * draw.random(rows) < (skill or 0)
            answers = np.where(right, targets, (targets + 1) % (2 + (task == "mnli")))
            answers = np.zeros(rows, int) if skill is None else answers
            found.append(answered(method, task, targets.tolist(), answers.tolist(), metric=metric))
    return found


def of_accuracy(right: int, rows: int, folder: Path, **changes: Any) -> list[float]:
    write_made([answered("pretrained", "cola", rows * [1], right * [1] + (rows - right) * [0], **changes)], folder)
    return [float(value) for value in load_leaderboard(folder).cells.loc[0, ["ci_low", "ci_high"]]]


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),  # by Wilson's formula, as other tables have them
    [(7, 10, 39.68, 89.22), (0, 10, 0, 27.75), (10, 10, 72.25, 100), (81, 263, 25.53, 36.62)],
)
def test_an_accuracys_interval_is_wilsons(right: int, rows: int, low: float, high: float, tmp_path: Path) -> None:
    assert of_accuracy(right, rows, tmp_path) == pytest.approx([low, high], abs=0.005)


def test_rows_of_one_source_count_as_one(tmp_path: Path) -> None:
    """Forty rows of four sources, each right or wrong as a whole."""
    sources = [str(row // 10) for row in range(40)]
    assert of_accuracy(20, 40, tmp_path / "a") == pytest.approx([35.2, 64.8], abs=0.05)
    assert of_accuracy(20, 40, tmp_path / "b", clusters=sources) == [0, 100]  # 1 in 16 draws has one kind alone


def test_intervals_hold_their_values_and_the_experts_mean_is_exact(tmp_path: Path) -> None:
    write_made(drawn(), tmp_path)
    board = load_leaderboard(tmp_path)
    for row in board.cells.to_dict("records"):
        assert row["ci_low"] <= row["score"] <= row["ci_high"]
        assert row["ci_low"] < row["ci_high"] or (row["method"], row["task"]) == ("constant", "cola")
    table = board.summary.set_index("method")
    assert list(table.loc["experts", ["normalized", "ci_low", "ci_high", "stderr"]]) == [100, 100, 100, 0]
    assert table.loc["experts", ["rank_low", "rank_high", "tie_group"]].isna().all()


def correlation(targets: Any, answers: Any) -> float:
    """Return Matthews' correlation of two labels, which is Pearson's of 0 and 1; 0 where a side is constant."""
    spread = targets.std() * answers.std()
    return float((np.mean(targets * answers) - targets.mean() * answers.mean()) / spread) if spread else 0.0


def test_means_and_differences_are_those_of_a_bootstrap_written_another_way(tmp_path: Path) -> None:
    """Draws one by one, each metric on the drawn rows; the same rows for all methods, the experts and the floor."""
    scored = drawn()
    write_made(scored, tmp_path)
    board = load_leaderboard(tmp_path, compare_to="ties")
    answers = {(cell.method, cell.task): np.array(own.predictions) for cell, own in scored}
    targets = {cell.task: np.array(own.targets) for cell, own in scored}
    draw, found = np.random.default_rng(1), {name: [] for name in ("average", "ties", "gain")}
    for _ in range(1500):
        rows = {task: draw.integers(0, len(own), len(own)) for task, own in targets.items()}

        def score(method: str, task: str, rows: dict[str, Any] = rows) -> float:
            own, expected = answers[method, task][rows[task]], targets[task][rows[task]]
            return correlation(expected, own) if task == "cola" else float(np.mean(own == expected))

        for method in ("average", "ties"):
            found[method].append(np.mean([100 * score(method, task) / score("experts", task) for task in TASKS]))
        floors = {task: score("constant", task) for task in TASKS}
        gains = [
            100 * (score("average", task) - floors[task]) / (score("experts", task) - floors[task]) for task in TASKS
        ]
        found["gain"].append(np.mean(gains))
    table = board.summary.set_index("method")
    (difference,) = board.comparisons.query("reason == 'reference' and method == 'average'").to_dict("records")
    for ours, theirs in (
        (table.loc["average", ["ci_low", "ci_high"]], found["average"]),
        (table.loc["ties", ["ci_low", "ci_high"]], found["ties"]),
        (table.loc["average", ["gain_ci_low", "gain_ci_high"]], found["gain"]),
        ((difference["ci_low"], difference["ci_high"]), np.subtract(found["average"], found["ties"])),
    ):
        width = float(np.ptp(np.quantile(theirs, [0.025, 0.975])))
        assert list(ours) == pytest.approx(list(np.quantile(theirs, [0.025, 0.975])), abs=0.06 * width)
    assert table["stderr"]["average"] == pytest.approx(np.std(found["average"]), rel=0.06)


def frames(board: Leaderboard) -> list[pd.DataFrame]:
    return [board.cells.drop(columns=["samples", "key"]), board.tasks, board.summary, board.comparisons]


def test_neither_the_order_of_rows_nor_other_methods_change_a_figure(tmp_path: Path) -> None:
    scored = drawn(metrics=("acc_f1", "mcc"))
    write_made(scored, tmp_path / "a")
    turned = []
    for cell, own in scored:
        order = np.random.default_rng(len(own.identities)).permutation(len(own.identities)).tolist()
        columns = {
            name: [getattr(own, name)[row] for row in order]
            for name in ("identities", "predictions", "targets", "scores")
        }
        turned.append((cell, dataclasses.replace(own, **columns)))
    write_made(turned, tmp_path / "b")
    fewer = [one for one in scored if one[0].method != "ties"]
    write_made(fewer, tmp_path / "c")
    first, again, other, without = (load_leaderboard(tmp_path / name) for name in "aabc")
    for ours, same, theirs in zip(frames(first), frames(again), frames(other), strict=True):
        pd.testing.assert_frame_equal(ours, same, check_exact=True)
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    columns = ["normalized", "ci_low", "ci_high", "stderr", "gain", "gain_ci_low", "gain_ci_high"]
    whole = first.summary[first.summary["method"] != "ties"][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(whole, without.summary[columns], check_exact=True)
