"""A suite with a twin that lacks an expert, and one whose router falls back: what its tables say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from tests.support.suites import rows_of, run

ROUTER = {"kind": "nearest_centroid", "fallback": "shared", "keep": 0.7, "held_out": 0.4}


def test_a_held_out_expert_has_a_row_and_its_rows_fall_back(tiny: dict[str, Any], data: Path, tmp_path: Path) -> None:
    entry = {"method": "twin", "router": ROUTER, "without": "mnli"}
    suite = {**tiny, "protocol": ["standard", "routed"], "methods": [{"held_out": entry}]}
    assert run(suite, tmp_path) == 0
    rows = rows_of(tmp_path)
    out = tmp_path / "out"
    held_out = {(protocol, task) for protocol, method, task in rows if method == "held_out"}
    assert held_out == {("standard", task) for task in tiny["tasks"]}
    (skipped,) = json.loads((out / "skipped.json").read_text())
    assert (skipped["protocol"], skipped["method"]) == ("routed", "held_out")
    legend = (out / "leaderboard.md").read_text()
    assert "protocol routed takes the head from the router, which names none for a row that falls back" in legend
    (samples,) = (out / "samples" / "standard" / "held_out").glob("mnli-*.parquet")
    weights = pd.read_parquet(samples).filter(like="weight")
    assert weights.shape[1] == 2
    fell = int((weights == 0).all(axis=1).sum())
    assert 0 < fell < 30
    page = (out / "index.html").read_text()
    assert "shared expert</th>" in page.replace(" </th>", "</th>")


def test_rows_that_a_router_needs_are_counted_before_the_first_cell(
    tiny: dict[str, Any], data: Path, tmp_path: Path, capsys: Any
) -> None:
    """27 rows are stored where max_rows leaves nine of each task."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    router = {"kind": "knn", "max_rows": 10, "options": {"neighbours": 28}}
    methods = [{"near": {"method": "twin", "router": router}}]
    assert run({**tiny, "methods": methods}, tmp_path) == 2
    said = capsys.readouterr().err
    assert "error: near: router.options.neighbours 28: only 27 rows are stored; give fewer" in said
    assert not list((tmp_path / "out").glob("cells/**/*.json"))
    two = {**methods[0]["near"], "without": "cola", "router": {**router, "options": {"neighbours": 19}}}
    assert run({**tiny, "methods": [{"near": two}]}, tmp_path) == 2
    assert "error: near: router.options.neighbours 19: only 18 rows are stored" in capsys.readouterr().err
