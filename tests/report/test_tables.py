"""The tables of a leaderboard in a terminal, in Markdown and in LaTeX: nothing is cut, nothing said that is not so."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.board import Drawn, drawn_board
from tests.support.cells import answered, write_made
from twin_bench import cli
from twin_bench.report.latex import latex
from twin_bench.report.legend import legend


@pytest.fixture
def board(tmp_path: Path) -> Drawn:
    return drawn_board(tmp_path, methods=4, tasks=8, protocols=1, rows=20)


def test_a_comparison_cuts_nothing_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_method_of_a_rather_long_name"
    for folder, right in (("a", 35), ("b", 30)):
        answers = [1] * right + [0] * (40 - right)
        write_made(
            [answered(name, task, [1] * 40, answers) for task in ("cola", "a_task_of_a_name")], tmp_path / folder
        )
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["protocol", "method", "task", "rows", "first", "second", "difference", "(95%)", "p"]
    mean: Any = lines[3].split()
    assert mean[:6] == ["standard", name, "(mean)", "80", "87.5", "75.0"]
    assert mean[6] == "+12.5"
    assert "…" not in "".join(lines)


def of_tasks(board: Drawn, **columns: list[Any]) -> Drawn:
    """Return the board with other values for its first tasks."""
    tasks = board.tasks.copy()
    for column, values in columns.items():
        tasks[column] = [*values, *tasks[column][len(values) :]]
    return dataclasses.replace(board, tasks=tasks)


def test_the_constant_answer_is_called_what_it_is(board: Drawn) -> None:
    for said in (" ".join(legend(board)), latex(board)):
        assert "the most frequent training label, or the mean of the training rows' numbers" in said
        assert "best constant" not in said
    assert "Another constant may score more" in " ".join(legend(board))


def test_floors_stand_beside_chance(board: Drawn) -> None:
    said = legend(of_tasks(board, floor=[10.0, 45.0, 50.0], chance=[math.nan, 50.0, 50.0]))
    floors = next(place for place, one in enumerate(said) if one.startswith("Floors (the constant answer): cola 10.00"))
    assert said[floors + 1].startswith("Chance (one over the number of labels or options")
    (below,) = [one for one in said if "below chance" in one]
    assert below.startswith("The floor is below chance on sst2")
    assert "cola" not in below
    assert "mrpc" not in below


def test_tasks_that_are_unpaired_or_have_no_floor_are_named(board: Drawn) -> None:
    same, outside = "the same rows serve every method, the experts and the floor", "not in the mean of gains"
    (said,) = [one for one in legend(board) if same in one]
    assert f"{same}." in said
    changed = of_tasks(board, paired=[False, True, False], floor=[math.nan, math.nan], expert=["cola", None])
    (said,) = [one for one in legend(changed) if same in one]
    assert f"{same}, but on cola (standard), mrpc (standard), where each method has draws of its own" in said
    (said,) = [one for one in legend(changed) if outside in one and "No floor" in one]
    assert said == "No floor is known, so the task has no gain and is not in the mean of gains: cola (standard)."
