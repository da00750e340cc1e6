"""Rows that are scored and rows that are trained on: what a run refuses, and what it says below its table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.suites import rows_of, run

TWIN = {"twin": {"router": {"epochs": 2}}}


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "rows"))


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines(keepends=True)


def refused(suite: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a suite that must fail before its first cell; return the error's line."""
    capsys.readouterr()
    assert run(suite, folder, *arguments) == 2
    assert not list((folder / "out").glob("cells/**/*.json"))
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))


def test_a_split_that_is_both_scored_and_trained_on(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused({**tiny, "split": "train", "methods": ["average", "fisher"]}, tmp_path, capsys)
    assert "task cola: split train is scored, and fisher is made from it; score another split, or leave fisher" in said
    assert run({**tiny, "tasks": ["cola"], "split": "train", "methods": ["average"]}, tmp_path) == 0
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "average"}  # no constant answer


def test_all_scored_rows_of_a_task_among_the_training_rows(
    tiny: dict[str, Any], copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(copied / "stsb" / "validation.jsonl", copied / "stsb" / "train.jsonl")
    said = refused({**tiny, "data": str(copied), "methods": ["fisher"]}, tmp_path, capsys)
    assert "stsb/validation.jsonl: all 30 rows are among the rows that fisher is made from" in said


def test_some_scored_rows_among_a_routers_are_counted(
    tiny: dict[str, Any], copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows count as equal where text and pair are; labels are not compared."""
    fields = {"cola": ("sentence",), "stsb": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}
    router = []
    for task, (first, *pair) in fields.items():
        scored = [json.loads(line) for line in lines(copied / task / "validation.jsonl")]
        trained = [json.loads(line) for line in lines(copied / task / "train.jsonl")]
        for row in (*scored[: 7 if task == "mnli" else 0], *trained):
            router.append({"text": row[first], "text_pair": row[pair[0]] if pair else None, "task": task})
    file = tmp_path / "router.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in router))
    suite = {**tiny, "router": {"data": str(file)}, "methods": [TWIN]}
    assert run(suite, tmp_path) == 0
    legend = (tmp_path / "out" / "leaderboard.md").read_text()
    assert legend.count("are among the training rows") == 1
    assert "7 of 30 rows of mnli's split validation are among the training rows of twin." in legend
    assert run({**suite, "methods": ["average"]}, tmp_path / "free") == 0
    assert "are among the training rows" not in (tmp_path / "free" / "out" / "leaderboard.md").read_text()


def test_an_expert_with_one_training_row(
    tiny: dict[str, Any], copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine cells were scored first: one row can't both be trained on and held out. A twin that is told needs two."""
    file = copied / "cola" / "train.jsonl"
    file.write_text(lines(file)[0])
    told = {"told": {"method": "twin", "weights": "task"}}
    said = refused({**tiny, "data": str(copied), "methods": ["average", told]}, tmp_path, capsys)
    assert f"{file}: expert 'cola' has 1 rows; it needs two, one of them held out" in said


def test_a_routers_file_that_is_not_there(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "none.jsonl"
    said = refused({**tiny, "router": {"data": str(file)}, "methods": [TWIN]}, tmp_path, capsys)
    assert f'{file}: no such file; router.data is a file of rows {{"text": ..., "task": EXPERT}}, or a folder' in said


def test_an_empty_file_of_training_rows_matters_where_they_are_read(
    tiny: dict[str, Any], copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "cola" / "train.jsonl").write_text("\n")
    suite = {**tiny, "tasks": ["cola"], "data": str(copied)}
    assert run({**suite, "methods": ["average"]}, tmp_path / "free") == 0
    assert "cola/train.jsonl: empty" in refused({**suite, "methods": ["fisher"]}, tmp_path / "made", capsys)
