"""A data set on the hub without training rows: whom that concerns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support.suites import rows_of, run


def test_a_data_set_of_one_split_is_enough_where_nothing_reads_training_rows(
    tiny: dict[str, Any],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "only-test"
    folder.mkdir()
    rows = (data / "cola" / "validation.jsonl").read_text()
    (folder / "test.jsonl").write_text(rows)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = {"hub": str(folder), "split": "test"}
    task = {"text": "sentence", "labels": ["no", "yes"], "expert": "cola", "data": source}
    suite = {**tiny, "experts": {"cola": tiny["experts"]["cola"]}, "tasks": {"own": task}}
    assert run({**suite, "methods": ["average"]}, tmp_path / "free") == 0
    assert rows_of(tmp_path / "free")["standard", "average", "own"]["n"] == len(rows.splitlines())
    assert run({**suite, "methods": ["fisher"]}, tmp_path / "made") == 2
    said = capsys.readouterr().err
    assert 'Unknown split "train"' in said
    assert "a method is made from training rows: leave it out, or give data: a directory of {task}/{split}" in said
    assert not list((tmp_path / "made" / "out").glob("cells/**/*.json"))
