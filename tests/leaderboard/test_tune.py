"""Options tuned on held-out training rows: what is chosen, from which rows, and that scored rows play no part."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import twin_bench
from tests.support.families import Family
from tests.support.models import WORDS, tiny_classifier, tiny_tokenizer
from tests.support.rows import task_rows, write_generative_rows, write_rows
from tests.support.suites import rows_of, run, with_backbone
from twin_bench.errors import UnsuitedError
from twin_bench.leaderboard.tune import hold_out
from twin_bench.merging.registry import REGISTRY, find_method

GRID = (0.1, 1.0, 3.0)


@pytest.fixture(autouse=True)
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    header = dataclasses.replace(find_method("task_arithmetic"), tune={"scaling": GRID})
    monkeypatch.setitem(REGISTRY, "task_arithmetic", header)


@pytest.fixture(scope="module")
def expert(families: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An expert far from the base model, whose answers differ from those of other scalings."""
    folder = tmp_path_factory.mktemp("expert")
    model = tiny_classifier("bert", num_labels=3, seed=5, like=families("bert").base, noise=0.4)
    model.save_pretrained(folder)
    return folder, model


def answered_by(model: Any, count: int) -> list[dict[str, Any]]:
    """Rows whose labels are the model's own answers."""
    rows = []
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        first, second = (
            " ".join(WORDS[index] for index in torch.randint(len(WORDS), (7,), generator=generator)) for _ in range(2)
        )
        label = int(model(**tiny_tokenizer()(first, second, return_tensors="pt")).logits.argmax())
        rows.append({"premise": first, "hypothesis": second, "label": label})
    return rows


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def suite(families: Any, expert: Any, tmp_path: Path) -> dict[str, Any]:
    write(tmp_path / "data" / "mnli" / "train.jsonl", answered_by(expert[1], 60))
    write(tmp_path / "data" / "mnli" / "validation.jsonl", answered_by(expert[1], 12))
    return {
        "name": "tuned",
        "base_model": families("bert").recipe["base_model"],
        "experts": {"mnli": str(expert[0])},
        "data": str(tmp_path / "data"),
        "tasks": ["mnli"],
        "methods": [{"task_arithmetic": {"scaling": 0.3}}],
    }


def test_scored_rows_have_no_part_in_the_choice(
    suite: dict[str, Any], families: Any, expert: Any, tmp_path: Path
) -> None:
    """Training rows ask for the expert's answers (scaling 1), scored rows for those of scaling 0.1."""
    base = dict(families("bert").base.bert.named_parameters(prefix="bert"))
    own = {"mnli": dict(expert[1].bert.named_parameters(prefix="bert"))}
    scores = {}
    for scaling in (1.0, 0.1):
        merged = twin_bench.merge("task_arithmetic", base, own, scaling=scaling)
        write(tmp_path / "data" / "mnli" / "validation.jsonl", answered_by(with_backbone(expert[1], merged), 12))
        assert run(suite, tmp_path / f"{scaling}", "--tune") == 0
        rows = rows_of(tmp_path / f"{scaling}")
        assert {method for _, method, _ in rows} == {
            "pretrained",
            "experts",
            "constant",
            "task_arithmetic",
            "task_arithmetic+tuned",
        }
        row = rows["standard", "task_arithmetic+tuned", "mnli"]
        assert row["settings"] == {"scaling": 1.0}
        assert row["n"] == 12
        tuned = row["notes"]["tuned"]
        assert tuned["grid"] == {"scaling": list(GRID)}
        assert tuned["rows"] == {"mnli": 30}
        assert tuned["normalized"][1] == 100
        assert max(tuned["normalized"][0], tuned["normalized"][2]) < 100
        assert rows["standard", "task_arithmetic", "mnli"]["settings"] == {"scaling": 0.3}
        scores[scaling] = row["score"]
    assert scores[1.0] == 100
    assert scores[0.1] < 100
    legend = (tmp_path / "1.0" / "out" / "leaderboard.md").read_text()
    assert (
        "task_arithmetic+tuned (standard): scaling 1.0 of [0.1, 1.0, 3.0], chosen on held-out training rows, which the "
        "experts may have been trained on: mnli 30." in legend
    )


def test_what_can_not_be_tuned(suite: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run({**suite, "methods": ["average"]}, tmp_path, "--tune") == 2
    assert "--tune: none of these methods has a grid to choose its options from" in capsys.readouterr().err
    double = ["task_arithmetic", {"task_arithmetic+tuned": {"method": "average"}}]
    assert run({**suite, "methods": double}, tmp_path, "--tune") == 2
    assert "two methods are labelled 'task_arithmetic+tuned'" in capsys.readouterr().err
    (tmp_path / "data" / "mnli" / "train.jsonl").unlink()
    assert run(suite, tmp_path, "--tune", "--limit", "2") == 0
    (skipped,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert skipped["method"] == "task_arithmetic+tuned"
    assert "mnli/train.jsonl: no such file; options are chosen on held-out training rows" in skipped["reason"]
    assert ("standard", "task_arithmetic", "mnli") in rows_of(tmp_path)


def test_held_out_rows_are_training_rows_that_stay_out_of_train(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    tasks = ("cola", "mnli")
    before = {file: file.read_bytes() for file in data.rglob("*.jsonl")}
    found = hold_out(task_rows(data, *tasks), tmp_path / "tuning", 9, seed=3)
    assert {file: file.read_bytes() for file in data.rglob("*.jsonl")} == before

    def lines(file: Path) -> list[str]:
        return sorted(json.dumps(json.loads(line), sort_keys=True) for line in file.read_text().splitlines())

    for task in tasks:
        kept, chosen = lines(found / task / "train.jsonl"), lines(found / task / "validation.jsonl")
        assert len(chosen) == 9
        assert sorted(kept + chosen) == lines(data / task / "train.jsonl")
    assert not (found / "stsb").exists()
    assert hold_out(task_rows(data, *tasks), tmp_path / "tuning", 9, seed=3) == found
    changed = ((9, 4), (8, 3), (900, 3))
    others = [hold_out(task_rows(data, *tasks), tmp_path / "tuning", limit, seed) for limit, seed in changed]
    assert len({found, *others}) == 4
    assert lines(others[0] / "cola" / "validation.jsonl") != lines(found / "cola" / "validation.jsonl")
    assert len(lines(others[2] / "cola" / "validation.jsonl")) == 20  # half of forty, never more
    (data / "mnli" / "dev.jsonl").write_text((data / "mnli" / "train.jsonl").read_text())
    with_dev = hold_out(task_rows(data, *tasks), tmp_path / "tuning", 9, seed=3)
    assert (with_dev / "mnli" / "dev.jsonl").read_text() == (data / "mnli" / "dev.jsonl").read_text()
    (data / "cola" / "train.jsonl").write_text('{"sentence": "a cat", "label": 1}\n')
    with pytest.raises(UnsuitedError, match="only one row; options are chosen on held-out training rows"):
        hold_out(task_rows(data, *tasks), tmp_path / "tuning", 9, seed=3)


def test_language_models_are_tuned_through_the_same_tasks(
    wide_llama: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = {
        "name": "tuned",
        "base_model": wide_llama.recipe["base_model"],
        "experts": {"bbq": wide_llama.recipe["experts"]["bbq"]},
        "data": str(write_generative_rows(tmp_path / "data")),
        "tasks": ["bbq"],
        "rows": 5,
        "batch_size": 5,
        "methods": ["task_arithmetic"],
    }
    assert run(suite, tmp_path, "--tune", "--harness", "helm") == 2
    assert "which --harness helm does not score" in capsys.readouterr().err
    train = tmp_path / "data" / "bbq" / "train.jsonl"  # every letter is right for some, so that the expert scores
    lines = train.read_text().splitlines()
    write(train, [json.loads(line) | {"label": index % 3} for index, line in enumerate(lines)])
    assert run(suite, tmp_path, "--tune") == 0
    row = rows_of(tmp_path)["standard", "task_arithmetic+tuned", "bbq"]
    tuned = row["notes"]["tuned"]
    assert tuned["rows"] == {"bbq": 5}  # as many as are scored
    assert row["settings"] == {"scaling": GRID[tuned["normalized"].index(max(tuned["normalized"]))]}
    (tmp_path / "data" / "mmlu" / "train.jsonl").unlink()  # a task that is nobody's has no part in the choice
    nobodys = {**suite, "tasks": {"bbq": None, "mmlu": {"expert": None, "few_shot": 0}}}
    assert run(nobodys, tmp_path / "nobodys", "--tune") == 0
    rows = rows_of(tmp_path / "nobodys")
    assert rows["standard", "task_arithmetic+tuned", "bbq"]["notes"]["tuned"] == tuned
    assert rows["standard", "task_arithmetic+tuned", "mmlu"]["settings"] == row["settings"]
