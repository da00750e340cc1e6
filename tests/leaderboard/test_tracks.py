"""Methods that take more than weights, on the leaderboard: the task's name, statistics of training inputs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import twin_bench
from tests.support.families import Family
from tests.support.rows import TASKS, task_rows
from tests.support.suites import rows_of, run, score_alone, with_backbone
from twin_bench.checkpoints.sources import open_sources
from twin_bench.errors import UnsuitedError
from twin_bench.leaderboard.harness import Evaluated
from twin_bench.merging import calibration
from twin_bench.merging.calibration import calibration_examples, fisher_diagonals, gram_matrices
from twin_bench.merging.registry import REGISTRY, find_method
from twin_bench_lm_eval.harness import LmEval


@pytest.fixture(scope="module")
def suite(tiny: dict[str, Any]) -> dict[str, Any]:
    return {
        **tiny,
        "methods": [
            "emr",
            {"fisher": {"protocol": "standard"}},
            {"regmean_0.5": {"method": "regmean", "alpha": 0.5, "protocol": "standard"}},
        ],
        "calibration_rows": 12,
    }


def backbones(family: Family) -> tuple[Any, Any]:
    experts = {task: dict(model.bert.named_parameters(prefix="bert")) for task, model in family.experts.items()}
    return dict(family.base.bert.named_parameters(prefix="bert")), experts


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes most of the time, where the figures don't matter."""
    monkeypatch.setattr(LmEval, "score", lambda *_: Evaluated(0.5, 0.1, 30))


@pytest.fixture(scope="module")
def board(suite: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("board")
    assert run({**suite, "protocol": ["standard", "paper"]}, folder) == 0
    return folder / "out", rows_of(folder)


@pytest.mark.parametrize("task", TASKS)
def test_emr_serves_each_task_its_own_parameters(family: Family, data: Path, board: Any, task: str) -> None:
    base, experts = backbones(family)
    row = board[1]["standard", "emr", task]
    own = twin_bench.merge("emr", base, experts, task=task)
    alone = score_alone(with_backbone(family.experts[task], own), task, data)
    assert row["score"] == pytest.approx(alone, abs=1e-3)
    assert row["track"] == "task-id given"
    size = sum(tensor.numel() for tensor in base.values())
    assert row["parameters"] == 2 * size + 3 * (-(-size // 32) + 1)


@pytest.mark.parametrize("task", TASKS)
def test_emr_under_the_papers_protocol(family: Family, data: Path, board: Any, task: str) -> None:
    base, experts = backbones(family)
    matrices = {name: tensor for name, tensor in base.items() if "bias" not in name}
    own = {**experts[task], **twin_bench.merge("emr", matrices, experts, task=task)}
    alone = score_alone(with_backbone(family.experts[task], own), task, data)
    assert board[1]["paper", "emr", task]["score"] == pytest.approx(alone, abs=1e-3)


def test_a_shared_expert_is_made_of_weights_alone(
    suite: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run({**suite, "methods": [{"twin": {"shared": {"method": "emr"}}}]}, tmp_path) == 2
    assert "emr needs task, and a recipe merges weights alone" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_calibrated_methods_are_merged_with_statistics_of_training_rows(
    family: Family, data: Path, board: Any, task: str
) -> None:
    base, experts = backbones(family)
    sources = open_sources(family.recipe["base_model"], family.recipe["experts"])
    for method, label, options in (("fisher", "fisher", {}), ("regmean", "regmean_0.5", {"alpha": 0.5})):
        take = {"fisher": fisher_diagonals, "regmean": gram_matrices}[method]
        examples = {t: calibration_examples(task_rows(data, t), sources, rows=12) for t in TASKS}
        statistics = {t: take(family.experts[t], own) for t, own in examples.items()}
        merged = twin_bench.merge(method, base, experts, statistics=statistics, **options)
        row = board[1]["standard", label, task]
        alone = score_alone(with_backbone(family.experts[task], merged), task, data)
        assert row["score"] == pytest.approx(alone, abs=1e-3)
        assert row["track"] == "calibration"
        assert row["notes"]["calibration"]["rows"] == dict.fromkeys(TASKS, 12)
        assert row["settings"] == {**options, **{k: v for k, v in row["settings"].items() if k not in options}}


@pytest.mark.usefixtures("unscored")
def test_statistics_are_taken_once_and_of_training_rows_alone(
    suite: dict[str, Any], board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = board
    kept = sorted(file.name for file in out.glob("twins/*/gram-*/*.safetensors"))
    assert kept == sorted(f"{task}.safetensors" for task in TASKS)  # the experts', once
    assert (
        "fisher (standard): fisher statistics of training rows: cola 12, stsb 12, mnli 12."
        in (out / "leaderboard.md").read_text()
    )
    monkeypatch.setattr(calibration, "gram_matrices", lambda *_: pytest.fail("statistics were taken again"))
    again = {**suite, "protocol": ["standard", "paper"], "methods": [{"other": {"method": "regmean", "alpha": 0.1}}]}
    assert run(again, out.parent) == 0
    assert {"standard", "paper"} == {protocol for protocol, method, _ in rows_of(out.parent) if method == "other"}


@pytest.mark.usefixtures("unscored")
def test_training_rows_and_their_number_decide_whether_a_cell_is_run_again(
    suite: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    keys = []
    shutil.copytree(data, tmp_path / "data")
    small = {**suite, "data": str(tmp_path / "data"), "methods": ["regmean", "average"], "calibration_rows": 2}
    assert run(small, tmp_path) == 0
    keys.append({method: row["key"] for (_, method, task), row in rows_of(tmp_path).items() if task == "mnli"})
    assert run({**small, "calibration_rows": 3}, tmp_path) == 0
    keys.append({method: row["key"] for (_, method, task), row in rows_of(tmp_path).items() if task == "mnli"})
    train = tmp_path / "data" / "cola" / "train.jsonl"
    train.write_text(train.read_text().replace("cat", "dog"))
    assert run({**small, "calibration_rows": 3}, tmp_path) == 0
    keys.append({method: row["key"] for (_, method, task), row in rows_of(tmp_path).items() if task == "mnli"})
    assert len({key["regmean"] for key in keys}) == 3
    assert len({key["average"] for key in keys}) == 1


@pytest.mark.usefixtures("unscored")
def test_a_method_without_its_rows_is_skipped_with_the_reason(
    suite: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "stsb" / "train.jsonl").unlink()
    changed = {**suite, "data": str(tmp_path / "data"), "methods": ["fisher", "emr"]}
    assert run(changed, tmp_path) == 0
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "emr"}
    (skipped,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    reason = f"{tmp_path}/data/stsb/train.jsonl: no such file; statistics are computed from training rows"
    expected = {"suite": "tiny", "protocol": "standard", "method": "fisher", "track": "calibration", "reason": reason}
    assert skipped == {**expected, "failed": False}
    line = f"Skipped: fisher (standard): {reason}."
    assert line in (tmp_path / "out" / "leaderboard.md").read_text()
    assert line in (tmp_path / "out" / "index.html").read_text()
    assert "Skipped: fisher (standard)" in capsys.readouterr().out
    assert run({**suite, "methods": ["emr"]}, tmp_path) == 0
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == []


@pytest.mark.usefixtures("unscored")
def test_a_method_that_fails_half_way_leaves_no_half_row(
    suite: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = find_method("emr").function
    assert real is not None

    def unsuited_to_mnli(vectors: Any, *, task: str) -> Any:
        if task == "mnli":
            raise UnsuitedError("emr: no")
        return real(vectors, task=task)

    monkeypatch.setitem(REGISTRY, "emr", dataclasses.replace(find_method("emr"), function=unsuited_to_mnli))
    assert run({**suite, "methods": ["emr"]}, tmp_path) == 0
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts"}
    assert len(list((tmp_path / "out" / "cells" / "standard" / "emr").iterdir())) == 2
    monkeypatch.setitem(REGISTRY, "emr", dataclasses.replace(find_method("emr"), function=real))
    assert run({**suite, "methods": ["emr"]}, tmp_path) == 0
    assert {task for _, method, task in rows_of(tmp_path) if method == "emr"} == set(TASKS)
