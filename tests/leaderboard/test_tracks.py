"""Methods that take more than weights, on the leaderboard: the task's name, statistics of training inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import twin_bench
from tests.conftest import Family
from tests.leaderboard.test_leaderboard import TASKS, score_alone, with_backbone, write_rows
from twin_bench.leaderboard.__main__ import main


@pytest.fixture(scope="module")
def family(families: Any) -> Family:
    return families("bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture(scope="module")
def suite(family: Family, data: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "base_model": family.recipe["base_model"],
        "experts": family.recipe["experts"],
        "data": str(data),
        "tasks": list(TASKS),
        "methods": ["emr"],
    }


def run(suite: dict[str, Any], folder: Path, *arguments: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return main(["--suite", str(folder / "suite.yaml"), "--out", str(folder / "out"), *arguments])


def rows_of(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = json.loads((folder / "out" / "leaderboard.json").read_text())
    return {(row["protocol"], row["method"], row["task"]): row for row in rows}


def backbones(family: Family) -> tuple[Any, Any]:
    experts = {task: dict(model.bert.named_parameters(prefix="bert")) for task, model in family.experts.items()}
    return dict(family.base.bert.named_parameters(prefix="bert")), experts


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
    assert "emr needs task, and a shared expert is made of weights alone" in capsys.readouterr().err
