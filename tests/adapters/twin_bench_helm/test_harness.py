"""HELM as a harness: what a cell says of rows that could not be answered."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twin_bench import InputError, TwinModel
from twin_bench.data.generative import GENERATIVE
from twin_bench_helm import harness

pytestmark = pytest.mark.versions


def test_rows_that_were_set_aside_are_named(three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HELM scores them as empty answers, so they count."""
    raw = tmp_path / "benchmark_output" / "scenarios" / "summarization" / "data" / "cnndm.pk"
    raw.parent.mkdir(parents=True)
    raw.write_bytes(b"")
    results = {"id0": None, "id1": "a prompt of 70 tokens"}
    name = {"name": "rouge_2", "split": "test"}

    def run(output_path: str, **_: Any) -> None:
        folder = Path(output_path) / "runs" / "leaderboard" / "one"
        folder.mkdir(parents=True, exist_ok=True)
        states = [
            {
                "instance": {"id": row},
                "train_trial_index": 0,
                "result": {"success": not error, **({"error": error} if error else {})},
            }
            for row, error in results.items()
        ]
        rows = [
            {"instance_id": row, "train_trial_index": 0, "stats": [{"name": name, "mean": 0.0 if error else 0.5}]}
            for row, error in results.items()
        ]
        (folder / "scenario_state.json").write_text(json.dumps({"request_states": states}))
        (folder / "per_instance_stats.json").write_text(json.dumps(rows))
        (folder / "stats.json").write_text(json.dumps([{"name": name, "mean": 0.25}]))

    monkeypatch.setattr(harness, "run_benchmarking", run)
    monkeypatch.setattr(harness, "run_entries_to_run_specs", lambda *_, **__: [SimpleNamespace(name="one")])
    twin = TwinModel.from_pretrained(three)
    found, _ = harness.evaluate(twin, "t", GENERATIVE["cnn_dailymail"], workspace=tmp_path, rows=2, batch_size=2)
    assert found.values == [0.5, 0.0]
    assert found.set_aside == ["id1: a prompt of 70 tokens"]
    results["id0"] = "logits in float16: row 0 not finite"
    with pytest.raises(InputError, match="t on cnn_dailymail: HELM has no answer to any row; id0: logits in float16"):
        harness.evaluate(twin, "t", GENERATIVE["cnn_dailymail"], workspace=tmp_path, rows=2, batch_size=2)
