"""What a directory holds: other limits and options are other cells, and a table keeps what earlier runs scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.suites import rows_of, run
from twin_bench.leaderboard.cells import Cells
from twin_bench_lm_eval.harness import LmEval

METHODS = ["average", "task_arithmetic", {"twin": {"router": {"epochs": 2}}}]


def legend(folder: Path) -> str:
    return (folder / "out" / "leaderboard.md").read_text()


def test_a_run_with_a_limit_overwrites_nothing(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = {**tiny, "methods": METHODS}
    assert run(suite, tmp_path) == 0
    whole = rows_of(tmp_path)
    assert "The directory also holds" not in legend(tmp_path)
    assert run(suite, tmp_path, "--limit", "8", "--methods", "average") == 0
    limited = rows_of(tmp_path)
    assert {(method, row["n"]) for (_, method, _), row in limited.items()} == {
        ("pretrained", 8),
        ("experts", 8),
        ("average", 8),
    }
    assert "Not run on these rows: task_arithmetic (standard), twin (standard)." in legend(tmp_path)
    assert (
        "The directory also holds cells of other rows, limits, weights, options or versions: average (standard), "
        "experts (standard), pretrained (standard), task_arithmetic (standard), twin (standard)." in legend(tmp_path)
    )
    monkeypatch.setattr(LmEval, "score", lambda *_: pytest.fail("a finished cell was run again"))
    assert run(suite, tmp_path) == 0
    assert rows_of(tmp_path) == whole
    assert run(suite, tmp_path, "--methods", "average") == 0
    assert rows_of(tmp_path) == whole


def test_a_method_that_the_suite_does_not_list_keeps_its_row(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "tasks": ["cola"], "methods": ["average"]}
    assert run(suite, tmp_path, "--methods", "ties") == 0
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "ties"}
    assert run(suite, tmp_path) == 0
    assert [method for _, method, _ in rows_of(tmp_path)] == ["pretrained", "experts", "average", "ties"]
    assert run({**suite, "methods": ["average", {"ties": {"density": 0.5}}]}, tmp_path) == 0
    assert rows_of(tmp_path)["standard", "ties", "cola"]["settings"]["density"] == 0.5
    assert "options or versions: ties (standard)." in legend(tmp_path)


def test_tuned_rows_stay_without_tune(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = {**tiny, "tasks": ["mnli"], "methods": [{"task_arithmetic": {"scaling": 0.31}}]}
    assert run(suite, tmp_path, "--tune", "--limit", "6") == 0
    tuned = rows_of(tmp_path)
    assert ("standard", "task_arithmetic+tuned", "mnli") in tuned
    monkeypatch.setattr(LmEval, "score", lambda *_: pytest.fail("a finished cell was run again"))
    for again in ((), ("--tune",)):
        assert run(suite, tmp_path, "--limit", "6", *again) == 0
        assert rows_of(tmp_path) == tuned
    monkeypatch.undo()
    assert run(suite, tmp_path) == 0  # other rows are scored, and options for them were never chosen
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "task_arithmetic"}
    assert "task_arithmetic+tuned" in legend(tmp_path)


def test_a_damaged_cell_is_run_again_and_a_damaged_choice_made_again(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "tasks": ["mnli"], "methods": ["task_arithmetic"]}
    assert run(suite, tmp_path, "--tune", "--limit", "6") == 0
    expected = {row: (cell["score"], cell["stderr"], cell["settings"]) for row, cell in rows_of(tmp_path).items()}
    records = [
        *(tmp_path / "out" / "cells").rglob("*.json"),
        *(tmp_path / "out" / "tuning").glob("choice-*.json"),
        *list((tmp_path / "out" / "tuning" / "cells").rglob("*.json"))[:2],
    ]
    assert len(records) == 7
    for file in records:
        text = file.read_text()
        content = json.loads(text)["content"]
        value = content.get("score", content.get("tuned", {}).get("normalized"))
        damaged = text.replace(json.dumps(value, indent=2)[:4], "-1.5", 1) if file.parent.name == "tuning" else None
        file.write_text(damaged or text.replace(f'"score": {value}', '"score": 99.5'))
        assert file.read_text() != text
    assert run(suite, tmp_path, "--tune", "--limit", "6") == 0
    assert {r: (cell["score"], cell["stderr"], cell["settings"]) for r, cell in rows_of(tmp_path).items()} == expected


def test_a_suite_without_cells_has_none_to_show(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "none")
    assert cells.labels("standard") == []
    assert cells.others([]) == []
