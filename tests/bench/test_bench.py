"""The benchmark runs every case on the same rows and says what it ran on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.families import Family
from tests.support.rows import write_generative_rows, write_rows
from twin_bench.bench.__main__ import main
from twin_bench.bench.run import bench
from twin_bench.errors import InputError
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe


@pytest.fixture
def twin(twins: Any) -> Path:
    return twins("bert")


def test_all_cases_are_measured_against_the_plain_model(twin: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    arguments = ["--twin", str(twin), "--data", str(data), "--rows", "24", "--rounds", "2", "--merged-rows", "2"]
    assert main([*arguments, "--out", str(tmp_path / "bench.json")]) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["settings"] == {
        "experts": 3,
        "rows": 24,
        "batch_size": 32,
        "rounds": 2,
        "dtype": "torch.float32",
    }
    exact = {"plain", "one_hot", "diffuse", "soft", "routed", "routed_top_1", "per_sample_merge"}
    assert set(result["cases"]) == exact | {"soft_0.001", "soft_1e-05"}
    assert 0 <= result["notes"]["errors"]["0.001"] <= 1e-3
    assert 0 < result["memory"]["factors"] < 3
    assert set(result["unsupported"]) == {"peft_mixed"}  # these experts changed their position embeddings
    assert result["cases"]["plain"]["ratio"] == 1.0
    for case in result["cases"].values():
        assert len(case["runs"]) == 2
        assert min(case["runs"]) > 0


def test_a_language_models_cases(wide_llama: Family, tmp_path: Path) -> None:
    data = write_generative_rows(tmp_path / "data")
    router = {"data": str(data), "epochs": 2}
    build_twin(Recipe.model_validate({**wide_llama.recipe, "router": router}), tmp_path / "twin")
    result = bench(tmp_path / "twin", data, rows=5, batch_size=2, rounds=1)
    assert set(result["cases"]) == {"plain", "generate_diffuse", "generate_one_hot", "generate_fused"} | {
        *("plain_letters", "letters", "letters_routed", "lm_eval_hf", "lm_eval_twin"),
        *({"peft_mixed"} - result["unsupported"].keys()),
    }
    assert result["machine"]["speed"]["launch"] > 0
    assert result["cases"]["lm_eval_twin"]["against"] == "lm_eval_hf"
    assert result["cases"]["letters"]["against"] == "plain_letters"
    assert result["notes"]["task"] == "mmlu"


def test_some_cases_alone(twin: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    result = bench(twin, data, rows=6, batch_size=2, rounds=1, only=["diffuse"])
    assert list(result["cases"]) == ["plain", "diffuse"]
    assert not result["build"]
    with pytest.raises(InputError, match="no case 'difuse' for this twin; did you mean 'diffuse'"):
        bench(twin, data, rows=6, only=["difuse"])


def test_errors(twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--twin", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "twin-bench build" in capsys.readouterr().err
    assert main(["--twin", str(twin), "--data", str(tmp_path)]) == 2
    assert "cola/validation.jsonl: no such file" in capsys.readouterr().err
