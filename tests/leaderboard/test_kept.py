"""What a directory holds: other limits and options are other cells, and a table keeps what earlier runs scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.support.families import Family
from tests.support.rows import write_generative_rows
from tests.support.suites import rows_of, run
from twin_bench.files import write_record
from twin_bench.results.cells import FORMAT, Cells
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
        ("constant", 8),
        ("average", 8),
    }
    assert "Not run on these rows: task_arithmetic (standard), twin (standard)." in legend(tmp_path)
    assert (
        "The directory also holds cells of other rows, limits, weights, options or versions: average (standard), "
        "constant (standard), experts (standard), pretrained (standard), task_arithmetic (standard), twin (standard)."
        in legend(tmp_path)
    )
    monkeypatch.setattr(LmEval, "score", lambda *_: pytest.fail("a finished cell was run again"))
    assert run(suite, tmp_path) == 0
    assert rows_of(tmp_path) == whole
    assert run(suite, tmp_path, "--methods", "average") == 0
    assert rows_of(tmp_path) == whole


def test_a_method_that_the_suite_does_not_list_keeps_its_row(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "tasks": ["cola"], "methods": ["average"]}
    assert run(suite, tmp_path, "--methods", "ties") == 0
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "constant", "ties"}
    assert run(suite, tmp_path) == 0
    assert [method for _, method, _ in rows_of(tmp_path)] == ["pretrained", "experts", "constant", "average", "ties"]
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
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "constant", "task_arithmetic"}
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
    assert len(records) == 8
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
    assert cells.labels() == []
    assert cells.others([]) == []


def test_the_order_of_the_tasks_decides_a_score(tiny: dict[str, Any], tmp_path: Path) -> None:
    """slerp at t 0 is the first expert. A method that draws expert by expert depends on the order, too."""
    tasks = ["cola", "mnli"]
    experts = {task: tiny["experts"][task] for task in tasks}
    suite = {**tiny, "experts": experts, "methods": [{"slerp": {"t": 0.0}}]}
    assert run({**suite, "tasks": tasks}, tmp_path) == 0
    first = rows_of(tmp_path)
    assert run({**suite, "tasks": tasks[::-1]}, tmp_path) == 0
    second = rows_of(tmp_path)
    for rows, task in ((first, "cola"), (second, "mnli")):
        assert rows["standard", "slerp", task]["score"] == rows["standard", "experts", task]["score"]
    for task in tasks:
        assert first["standard", "slerp", task]["key"] != second["standard", "slerp", task]["key"]


def test_rows_that_two_protocols_share_are_found_under_both(wide_llama: Family, tmp_path: Path) -> None:
    """A language model's cells of protocol routed are those of standard, and stand in its folder."""
    suite = {
        "name": "shared",
        "base_model": wide_llama.recipe["base_model"],
        "experts": {task: wide_llama.recipe["experts"][task] for task in ("mmlu", "bbq")},
        "data": str(write_generative_rows(tmp_path / "data")),
        "tasks": ["mmlu", "bbq"],
        "rows": 3,
        "protocol": ["standard", "routed"],
        "methods": ["task_arithmetic"],
    }
    assert run(suite, tmp_path, "--methods", "smile") == 0
    assert {protocol for protocol, method, _ in rows_of(tmp_path) if method == "smile"} <= {"standard", "routed"}
    before = {row for row in rows_of(tmp_path) if row[1] == "smile"}
    assert before
    assert run(suite, tmp_path) == 0
    assert {row for row in rows_of(tmp_path) if row[1] == "smile"} == before


def test_what_was_not_run_is_of_the_suite(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "tasks": ["cola"], "methods": ["average"]}
    assert run({**suite, "methods": [{"ties": {"density": 0.5}}]}, tmp_path) == 0
    assert run(suite, tmp_path) == 0
    assert "Not run" not in legend(tmp_path)
    assert "options or versions: ties (standard)." in legend(tmp_path)


def test_a_cell_says_what_scored_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "tasks": ["cola"], "methods": ["average"]}
    assert run(suite, tmp_path) == 0
    row = rows_of(tmp_path)["standard", "average", "cola"]
    assert row["device"] == "cpu"
    assert row["versions"]["transformers"] == transformers.__version__
    (file,) = (tmp_path / "out" / "cells" / "standard" / "average").glob("cola-*.json")
    content = json.loads(file.read_text())["content"]
    write_record(file, {**content, "versions": {**content["versions"], "transformers": "4.0"}}, format_number=FORMAT)
    assert run(suite, tmp_path) == 0
    assert f"transformers 4.0 and {transformers.__version__}" in legend(tmp_path)
