"""What the command line says of device, dtype and batch size takes the place of what the suite says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.suites import rows_of, run
from twin_bench.cli import main
from twin_bench.contenders import Contender
from twin_bench.leaderboard.harness import Evaluated, Job
from twin_bench_lm_eval.harness import LmEval


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, str, Any]]:
    """Return the dtype, the kind of device and the batch size of each cell that is scored."""
    seen: list[tuple[torch.dtype, str, Any]] = []

    def score(_: Any, contender: Contender, job: Job) -> Evaluated:
        seen.append((contender.twin.model.dtype, contender.twin.device.type, job.suite.batch_size))
        return Evaluated(0.5, 0.1, 10)

    monkeypatch.setattr(LmEval, "score", score)
    return seen


def test_flags_take_the_place_of_the_suites_words(tiny: dict[str, Any], tmp_path: Path, scored: Any) -> None:
    suite = {**tiny, "tasks": ["cola"], "methods": ["average"], "dtype": "bfloat16", "batch_size": 5, "device": "cpu"}
    assert run(suite, tmp_path) == 0
    assert set(scored) == {(torch.bfloat16, "cpu", 5)}
    first = rows_of(tmp_path)["standard", "average", "cola"]["key"]
    scored.clear()
    assert run(suite, tmp_path, "--batch-size", "auto") == 0
    assert not scored  # no answer depends on the batch, so the cells are these
    assert run(suite, tmp_path, "--dtype", "float32", "--batch-size", "auto", "--device", "cpu") == 0
    assert set(scored) == {(torch.float32, "cpu", "auto")}
    assert rows_of(tmp_path)["standard", "average", "cola"]["key"] != first


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        ({}, ["--dtype", "float8"], "the command line: dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ({}, ["--batch-size", "0"], "'0' is not a positive whole number"),
        ({}, ["--device", "gpu9"], "device 'gpu9': "),
        ({"device": "gpu9"}, [], "device 'gpu9': "),
        ({"batch_size": "all"}, [], "batch_size: "),
    ],
)
def test_what_they_do_not_take_is_found_at_once(
    tiny: dict[str, Any],
    tmp_path: Path,
    scored: Any,
    change: dict[str, Any],
    flags: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run({**tiny, "methods": ["average"], **change}, tmp_path, *flags) == 2
    assert says in capsys.readouterr().err
    assert not scored


def test_a_merge_is_written_in_the_dtype_that_is_asked_for(families: Any, tmp_path: Path) -> None:
    recipe = {key: families("bert").recipe[key] for key in ("base_model", "experts")} | {"merge": {"method": "average"}}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({**recipe, "dtype": "float32"}))
    assert main(["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_router_reads_features_in_the_dtype_that_is_asked_for(
    families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twin_bench.twin.model import TwinModel

    seen: set[torch.dtype] = set()
    features = TwinModel.features

    def watched(self: TwinModel, *arguments: Any) -> Any:
        seen.add(self.model.dtype)
        return features(self, *arguments)

    monkeypatch.setattr(TwinModel, "features", watched)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(families("bert").recipe))
    assert main(["build", str(tmp_path / "recipe.yaml"), str(tmp_path / "twin"), "--dtype", "bfloat16"]) == 0
    assert seen == {torch.bfloat16}
