"""The tables of a leaderboard in a terminal, in Markdown and in LaTeX: nothing is cut, nothing said that is not so."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.support.board import Drawn, drawn_board
from tests.support.cells import answered, write_made
from twin_bench import cli
from twin_bench.report.files import write_report
from twin_bench.report.latex import latex
from twin_bench.report.legend import legend
from twin_bench.report.page import page
from twin_bench.report.tables import table


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
    two = pd.concat([board.tasks, board.tasks.assign(protocol="paper", floor=[12.0, *board.tasks["floor"][1:]])])
    (floors,) = [one for one in legend(dataclasses.replace(board, tasks=two)) if one.startswith("Floors")]
    first, second = board.tasks["floor"][:2]
    assert f": cola {first:.2f} (standard), cola 12.00 (paper), sst2 {second:.2f}, " in floors
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


def test_latex_marks_the_leaders_that_are_not_told_the_task_alone(board: Drawn) -> None:
    leads = board.summary["tie_group"] == 1
    told = board.summary["told_the_task"]
    assert set(board.summary.loc[leads & told, "method"]) == {"twin_true_task"}
    bold = {name.replace("\\_", "_") for name in re.findall(r"textbf\{(\S+)\} &", latex(board))}
    assert bold == set(board.summary.loc[leads & ~told, "method"])
    assert "Bold: the methods that are not told the task and can't be told apart from the best of them." in latex(board)


def test_retention_stands_with_its_interval(board: Drawn) -> None:
    summary = board.summary.assign(retention=80.04, retention_ci_low=75.0, retention_ci_high=84.96)
    retained = dataclasses.replace(board, summary=summary)
    assert set(table(retained, "standard")["retention"]) == {"80.0 (75.0 to 85.0)", ""}  # chance has none
    assert latex(retained).count(r"& 80.0 {\scriptsize [75.0, 85.0]}") == len(summary)
    assert "80.0 <small>(75.0 to 85.0)</small>" in page(retained)
    for written in (table(board, "standard").columns, latex(board).lower()):
        assert "retention" not in written


def test_all_seeds_are_said(board: Drawn) -> None:
    assert [said for said in legend(board) if ". Seed 0. Versions: " in said]
    several = dataclasses.replace(board, identity={**board.identity, "seeds": 3})
    assert [said for said in legend(several) if ". Seeds 0 to 2 where a method draws, else 0. Versions: " in said]
    assert "protocol standard, seeds 0 to 2 where a method draws, else 0. Means" in latex(several)


def test_a_gain_of_minus_zero_is_written_as_zero(board: Drawn, tmp_path: Path) -> None:
    cells = board.cells.assign(gain=-0.0)
    write_report(dataclasses.replace(board, cells=cells), tmp_path)
    assert '"gain": 0.0' in (tmp_path / "leaderboard.json").read_text()
    for file in ("leaderboard.json", "leaderboard.csv"):
        assert not re.search(r"-0\.0\b", (tmp_path / file).read_text())
