"""The tables of a leaderboard in a terminal, in Markdown and in LaTeX: nothing is cut, nothing said that is not so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.board import Drawn, drawn_board
from tests.support.cells import answered, write_made
from twin_bench import cli


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
