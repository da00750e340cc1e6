"""The leaderboard of language models: its rows, what a protocol changes, and suites that can't be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.support.families import Family
from tests.support.rows import write_generative_rows
from tests.support.suites import rows_of, run
from twin_bench.paths import tasks_directory

TASKS = ("mmlu", "bbq", "cnn_dailymail")
TWO = {"epochs": 2}
BOUNDS = ("pretrained", "experts", "constant")


@pytest.fixture(scope="module")
def suite(wide_llama: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "name": "tiny-generative",
        "base_model": wide_llama.recipe["base_model"],
        "experts": wide_llama.recipe["experts"],
        "data": str(write_generative_rows(tmp_path_factory.mktemp("rows") / "data")),
        "tasks": list(TASKS),
        "protocol": ["standard", "routed"],
        "rows": 6,
        "batch_size": 3,
        "methods": [
            {"task_arithmetic": {"protocol": "standard"}},
            {"twin": {"router": {"epochs": 3}}},
            {"told": {"method": "twin", "exclusive": {"density": 1.0}, "weights": "task", "protocol": "standard"}},
        ],
    }


@pytest.fixture(scope="module")
def board(suite: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("board")
    assert run(suite, folder) == 0
    return folder / "out", rows_of(folder)


def test_every_cell_is_there_and_says_what_it_is(board: Any) -> None:
    out, rows = board
    expected = {("standard", method, task) for method in ("task_arithmetic", "told") for task in TASKS}
    for protocol in ("standard", "routed"):
        expected |= {(protocol, method, task) for method in (*BOUNDS, "twin") for task in TASKS}
        expected.add((protocol, "lead_3", "cnn_dailymail"))
    assert rows.keys() == expected
    for (_, method, task), row in rows.items():
        assert row["n"] == 6
        assert row["metric"] == ("rouge_2" if task == "cnn_dailymail" else "exact_match")
        chance = {"mmlu": 25.0, "bbq": pytest.approx(100 / 3)}.get(task)
        assert row["notes"].get("chance") == (None if method == "constant" else chance)
    table = (out / "leaderboard.md").read_text()
    assert "| chance |" in table
    assert "Chance (one over the number of labels or options, mean of the rows scored): mmlu 25.00, bbq 33.33" in table


def test_a_language_model_has_no_head_so_routed_is_standard(board: Any) -> None:
    _, rows = board
    for method in (*BOUNDS, "twin"):
        for task in TASKS:
            assert rows["routed", method, task]["score"] == rows["standard", method, task]["score"]


def test_an_expert_scores_what_lm_evals_own_model_scores(board: Any, wide_llama: Family, suite: dict[str, Any]) -> None:
    """And so does the twin that is told the task, at full rank."""
    _, rows = board
    assert {rows["standard", "experts", task]["score"] for task in TASKS} != {0.0}
    manager = TaskManager(include_path=str(tasks_directory()), include_defaults=False, metadata={"data": suite["data"]})
    for task in TASKS:
        hf = HFLM(wide_llama.recipe["experts"][task], device="cpu", batch_size=3)
        results = lm_eval.simple_evaluate(
            hf, tasks=[f"twin_{task}"], task_manager=manager, limit=6, bootstrap_iters=0, log_samples=False
        )["results"][f"twin_{task}"]
        metric = rows["standard", "experts", task]["metric"]
        for method in ("experts", "told"):
            assert rows["standard", method, task]["score"] == pytest.approx(100 * results[f"{metric},none"])
            assert rows["standard", method, task]["stderr"] == pytest.approx(100 * results[f"{metric}_stderr,none"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ["mmlu", "cola"]}, "one of mmlu and cola needs a classifier"),
        ({"tasks": ["mmul"]}, "did you mean 'mmlu'"),
        ({"dtype": "bfloat"}, "dtype"),
    ],
)
def test_suites_that_cannot_be_run(
    suite: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    assert run({**suite, **changes}, tmp_path, "--limit", "1") == 2
    assert says in capsys.readouterr().err


def test_experts_of_another_kind_than_the_tasks(
    families: Any, suite: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = families("bert").recipe
    changed = {
        **suite,
        "tasks": ["mmlu"],
        "base_model": bert["base_model"],
        "experts": {"mmlu": bert["experts"]["cola"]},
    }
    assert run(changed, tmp_path) == 2
    assert "mmlu needs causal_lm or seq2seq_lm experts, these are sequence_classification" in capsys.readouterr().err


def test_methods_that_do_not_suit_protocol_paper_are_skipped(suite: dict[str, Any], tmp_path: Path) -> None:
    """Whole checkpoints have no A and B. The run stopped after the cells of the first protocol."""
    changed = {**suite, "protocol": ["standard", "paper"], "methods": ["task_arithmetic", {"twin": {"router": TWO}}]}
    assert run({**changed, "rows": 1}, tmp_path) == 0
    rows = rows_of(tmp_path)
    assert {method for protocol, method, _ in rows if protocol == "standard"} == {
        *BOUNDS,
        "lead_3",
        "task_arithmetic",
        "twin",
    }
    assert {method for protocol, method, _ in rows if protocol == "paper"} == {*BOUNDS, "lead_3"}
    reasons = {one["method"]: one["reason"] for one in json.loads((tmp_path / "out" / "skipped.json").read_text())}
    assert "protocol paper adds A and B of LoRA adapters" in reasons["task_arithmetic"]
    assert "build the twin from adapters of one rank" in reasons["twin"]
