"""The leaderboard on a tiny family: every figure against transformers alone, resuming, and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import twin_bench
from tests.support.families import Family
from tests.support.rows import TASKS
from tests.support.suites import score_alone, with_backbone
from twin_bench import TwinModel
from twin_bench.leaderboard.__main__ import main
from twin_bench_lm_eval.harness import LmEval


@pytest.fixture(scope="module")
def suite_file(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    suite = {
        **tiny,
        "protocol": ["standard", "paper", "routed"],
        "methods": [
            "average",
            {"task_arithmetic": {"scaling": 0.29}},
            "ties",
            {"twin": {"exclusive": {"density": 0.5}, "router": {"epochs": 3, "layer": "auto"}}},
            {"ceiling": {"method": "twin", "exclusive": {"density": 1.0}, "router": {"epochs": 3}, "weights": "task"}},
        ],
    }
    file = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    file.write_text(yaml.safe_dump(suite))
    return file


@pytest.fixture(scope="module")
def board(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("board")
    assert main(["--suite", str(suite_file), "--out", str(out)]) == 0
    rows = json.loads((out / "leaderboard.json").read_text())
    return out, {(row["protocol"], row["method"], row["task"]): row for row in rows}


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_what_transformers_alone_scores(family: Family, data: Path, board: Any, task: str) -> None:
    rows = board[1]
    base = dict(family.base.bert.named_parameters(prefix="bert"))
    experts = {t: dict(m.bert.named_parameters(prefix="bert")) for t, m in family.experts.items()}
    models = {
        "pretrained": base,
        "experts": experts[task],
        "average": twin_bench.merge("average", base, experts),
        "task_arithmetic": twin_bench.merge("task_arithmetic", base, experts, scaling=0.29),
        "ties": twin_bench.merge("ties", base, experts),
        "ceiling": experts[task],
    }
    for method, parameters in models.items():
        alone = score_alone(with_backbone(family.experts[task], parameters), task, data)
        assert rows["standard", method, task]["score"] == pytest.approx(alone, abs=1e-3), method
    for bound in ("pretrained", "experts"):
        assert rows["routed", bound, task]["score"] == rows["standard", bound, task]["score"]


@pytest.mark.parametrize("task", TASKS)
def test_paper_rows_take_biases_from_the_true_expert(family: Family, data: Path, board: Any, task: str) -> None:
    base = dict(family.base.bert.named_parameters(prefix="bert"))
    experts = {t: dict(m.bert.named_parameters(prefix="bert")) for t, m in family.experts.items()}
    merged = twin_bench.merge("task_arithmetic", base, experts, scaling=0.29)
    mixed = {n: experts[task][n] if "bias" in n else tensor for n, tensor in merged.items()}
    alone = score_alone(with_backbone(family.experts[task], mixed), task, data)
    assert board[1]["paper", "task_arithmetic", task]["score"] == pytest.approx(alone, abs=1e-3)


def test_every_row_says_what_it_is(board: Any) -> None:
    out, rows = board
    for (protocol, method, task), row in rows.items():
        assert row["suite"] == "tiny"
        assert row["n"] == 30
        assert row["seed"] == 0
        assert row["stderr"] > 0 or row["score"] == 0.0  # a constant answer's MCC has no spread
        expert = rows[protocol, "experts", task]["score"]
        expected = 100 * row["score"] / expert if expert > 0 else None
        assert row["normalized"] == (None if expected is None else pytest.approx(expected))
        told = method == "ceiling"
        assert (row["track"] == "task-id given") == told
    assert {p for p, m, _ in rows if m == "twin"} == {"standard", "paper", "routed"}
    assert {p for p, m, _ in rows if m == "average"} == {"standard", "paper"}
    assert {m for p, m, _ in rows if p == "routed"} == {"pretrained", "experts", "constant", "twin"}
    chosen = {p: rows[p, "twin", "cola"]["notes"]["router"]["selected_on"] for p in ("standard", "paper", "routed")}
    assert chosen["standard"] == chosen["routed"] == "held-out training rows"
    assert "test rows" in chosen["paper"]
    table = pd.read_csv(out / "leaderboard.csv")
    assert len(table) == len(rows)
    for name in ("leaderboard.md", "index.html"):
        text = (out / name).read_text()
        assert "task_arithmetic" in text
        assert "cola (mcc) 30" in text


def test_a_killed_run_resumes_and_equals_an_unbroken_one(
    suite_file: Path, board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = LmEval.score, []

    def dies_at_the_fifth(*arguments: Any) -> Any:
        calls.append(arguments[-1].asked.task.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    arguments = ["--suite", str(suite_file), "--out", str(tmp_path), "--methods", "average,ceiling"]
    monkeypatch.setattr(LmEval, "score", dies_at_the_fifth)
    assert main(arguments) == 130
    assert not (tmp_path / "leaderboard.json").exists()
    assert len(list((tmp_path / "cells").rglob("*.json"))) == 4
    monkeypatch.setattr(LmEval, "score", real)
    assert main(arguments) == 0
    for row in json.loads((tmp_path / "leaderboard.json").read_text()):
        whole = board[1][row["protocol"], row["method"], row["task"]]
        assert row["score"] == whole["score"]
        assert row["stderr"] == whole["stderr"]
    monkeypatch.setattr(LmEval, "score", lambda *a: pytest.fail("a finished cell was run again"))
    assert main(arguments) == 0
    assert not list((tmp_path / "cells").rglob(".*"))


def test_features_are_kept_and_shared(
    suite_file: Path, board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin that is built and scored again is the same, and no row is run for its router."""
    out = tmp_path / "again"
    shutil.copytree(board[0], out)
    for again in ("twins", "cells/standard/twin", "cells/routed/twin"):
        shutil.rmtree(out / again)
    monkeypatch.setattr(TwinModel, "features", lambda *_: pytest.fail("a row is run for the router"))
    assert main(["--suite", str(suite_file), "--out", str(out)]) == 0
    for row in json.loads((out / "leaderboard.json").read_text()):
        whole = board[1][row["protocol"], row["method"], row["task"]]
        assert (row["score"], row["notes"]) == (whole["score"], whole["notes"])


def test_what_decides_a_score_decides_whether_a_cell_is_run_again(suite_file: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--methods", "average", "--suite"]
    suite = {**yaml.safe_load(suite_file.read_text()), "protocol": "standard"}

    def keys(changed: dict[str, Any]) -> dict[str, str]:
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**suite, **changed}))
        assert main([*arguments, str(tmp_path / "suite.yaml")]) == 0
        rows = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
        return {row["task"]: row["key"] for row in rows if row["method"] == "average"}

    first = keys({})
    assert keys({}) == first
    assert not set(keys({"seed": 1}).values()) & set(first.values())
    edited = tmp_path / "edited"
    for task in TASKS:
        (edited / task).mkdir(parents=True)
        for split in ("train", "validation"):
            text = (data / task / f"{split}.jsonl").read_text()
            changed = text.replace("cat", "dog") if (task, split) == ("cola", "validation") else text
            (edited / task / f"{split}.jsonl").write_text(changed)
    assert {task for task, key in keys({"data": str(edited)}).items() if key != first[task]} == {"cola"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["tis"]}, "unknown merge method 'tis'; did you mean 'ties'"),
        ({"methods": [{"ties": {"dense": 1}}]}, "ties has no option 'dense'; did you mean 'density'"),
        ({"methods": [{"twin": {"exclusive": {"density": 2}}}]}, "twin: exclusive.density"),
        ({"methods": [{"twin": {"router": {"layr": 1}}}]}, "twin: router: layr"),
        ({"methods": [{"../x": {"method": "ties"}}]}, "label '../x'"),
        ({"methods": ["ties", {"ties": {"density": 0.3}}]}, "two methods are labelled 'ties'"),
        ({"methods": [{"experts": {"method": "ties"}}]}, "label 'experts' belongs to a bound"),
        ({"methods": [{"chance": {"method": "ties"}}]}, "label 'chance' is that of the line below the table"),
        ({"methods": [{"ties": {"density": "half"}}]}, "ties: density must be a number, not 'half'"),
        ({"tasks": ["colla"]}, "no expert for task 'colla': no expert is named 'colla'; did you mean 'cola'"),
        ({"experts": {"cola": "x"}}, "no expert for task 'stsb'"),
        ({"protocl": "standard"}, "unknown key; did you mean 'protocol'"),
        ({"data": "/nowhere"}, "/nowhere/cola/validation.jsonl: no such file"),
        ({"experts": {"cola": "/none", "stsb": "/none", "mnli": "/none"}}, "'/none'"),
    ],
)
def test_bad_suites_end_in_one_line_and_status_2(
    suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    suite = {**yaml.safe_load(suite_file.read_text()), **change}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    assert main(["--suite", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("out/leaderboard*"))


def test_unknown_suites_and_methods(suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "glue-minlm", "--out", str(tmp_path)]) == 2
    assert "did you mean 'glue-minilm'" in capsys.readouterr().err
    assert main(["--suite", str(suite_file), "--out", str(tmp_path), "--methods", "averge"]) == 2
    assert "did you mean 'average'" in capsys.readouterr().err
    assert main(["--limit", "0"]) == 2
    assert "'0' is not a positive whole number" in capsys.readouterr().err
