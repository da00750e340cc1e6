"""A user's own tasks of classifiers: fields, labels and metrics in a suite's YAML."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from tests.support.families import Family
from tests.support.models import tiny_tokenizer
from tests.support.suites import rows_of, run

GLUE_IN_YAML = {
    "cola": {"text": "sentence", "labels": ["unacceptable", "acceptable"], "metric": "mcc"},
    "stsb": {"text": "sentence1", "text_pair": "sentence2"},
    "mnli": {
        "text": "premise",
        "text_pair": "hypothesis",
        "labels": ["entailment", "neutral", "contradiction"],
        "metric": "accuracy",
    },
}
NO_YES, STARS = ["no", "yes"], [10, 20, 30]
METHODS = [
    {"average": {"protocol": "standard"}},
    {"twin": {"router": {"epochs": 3}}},
    {"fisher": {"protocol": "standard"}},
    {"emr": {"protocol": "standard"}},
    {"adamerging": {"steps": 2, "protocol": "standard"}},
]


def test_glue_in_yaml_gives_bit_for_bit_what_the_built_in_tasks_give(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "methods": METHODS, "protocol": ["standard", "paper", "routed"], "calibration_rows": 8, "rows": 12}
    found = []
    for name, tasks in (("built-in", tiny["tasks"]), ("own", GLUE_IN_YAML)):
        assert run({**suite, "tasks": tasks}, tmp_path / name) == 0
        kept = ("score", "stderr", "normalized", "n", "metric", "expert", "notes")
        rows = rows_of(tmp_path / name)
        for row in rows.values():
            row["notes"].pop("twin", None)  # where it was built
        found.append({key: {k: row[k] for k in kept} for key, row in rows.items()})
    assert {method for _, method, _ in found[0]} == {
        "pretrained",
        "experts",
        "constant",
        *(next(iter(m)) for m in METHODS),
    }
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def desk(tiny: dict[str, Any], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a suite of tasks that the package has never heard of, on experts with names of their own."""
    folder = tmp_path_factory.mktemp("desk")
    names = {"tox": "cola", "sim": "stsb", "nli": "mnli"}
    for expert, task in names.items():
        shutil.copytree(tiny["experts"][task], folder / expert)
    for task, source, change in (
        ("toxicity", "cola", lambda row: {"comment": row["sentence"], "is_toxic": ("no", "yes")[row["label"]]}),
        ("rudeness", "cola", lambda row: {"said": row["sentence"][::-1], "label": row["label"]}),
        ("stars", "mnli", lambda row: {"review": row["premise"], "rating": (10, 20, 30)[row["label"]]}),
        ("similarity", "stsb", lambda row: {"a": row["sentence1"], "b": row["sentence2"], "score": row["label"]}),
    ):
        (folder / "rows" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            lines = (data / source / f"{split}.jsonl").read_text().splitlines()
            rows = [json.dumps(change(json.loads(line))) + "\n" for line in lines]
            (folder / "rows" / task / f"{split}.jsonl").write_text("".join(rows))
    return {
        "name": "desk",
        "base_model": tiny["base_model"],
        "experts": {name: str(folder / name) for name in names},
        "data": str(folder / "rows"),
        "tasks": {
            "toxicity": {
                "expert": "tox",
                "text": "comment",
                "label": "is_toxic",
                "labels": ["no", "yes"],
                "metric": "f1",
            },
            "rudeness": {"expert": "tox", "text": "said", "labels": NO_YES, "metric": "auroc"},
            "stars": {
                "expert": "nli",
                "text": "review",
                "label": "rating",
                "labels": [10, 20, 30],
                "metric": "f1_macro",
            },
            "similarity": {"expert": "sim", "text": "a", "text_pair": "b", "label": "score", "metric": "mse"},
        },
        "methods": ["average", {"twin": {"router": {"epochs": 3}}}, "emr", "fisher"],
        "calibration_rows": 8,
    }


def test_own_tasks_are_scored_by_their_metrics_under_their_experts_heads(
    desk: dict[str, Any], family: Family, data: Path, tmp_path: Path
) -> None:
    assert run(desk, tmp_path) == 0
    rows = rows_of(tmp_path)
    assert {task for _, _, task in rows} == set(desk["tasks"])
    tokenizer, answers = tiny_tokenizer(), {}
    for task, expert, fields in (("toxicity", "cola", ("comment",)), ("rudeness", "cola", ("said",))):
        lines = (Path(desk["data"]) / task / "validation.jsonl").read_text().splitlines()
        with torch.no_grad():
            answers[task] = torch.stack(
                [
                    family.experts[expert](**tokenizer(*(row[f] for f in fields), return_tensors="pt")).logits[0]
                    for row in map(json.loads, lines)
                ]
            )
    labels = [json.loads(line)["label"] for line in (data / "cola" / "validation.jsonl").read_text().splitlines()]
    expected = {
        "toxicity": 100 * f1_score(labels, answers["toxicity"].argmax(dim=1)),
        "rudeness": 100 * roc_auc_score(labels, answers["rudeness"].softmax(dim=1)[:, 1]),
    }
    for task, score in expected.items():
        assert rows["standard", "experts", task]["score"] == pytest.approx(score, abs=1e-3)
        assert rows["standard", "experts", task]["expert"] == "tox"
    similar = rows["standard", "average", "similarity"]
    assert similar["metric"] == "mse"
    best = rows["standard", "experts", "similarity"]["score"]
    assert similar["normalized"] == pytest.approx(100 * best / similar["score"])  # less is better
    said = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "Less is better on similarity (mse)" in said


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"label": "is_toxik"}, "toxicity/validation.jsonl, line 1: no field 'is_toxik'; did you mean 'is_toxic'"),
        ({"labels": ["no", "maybe"]}, ": is_toxic 'yes'; toxicity needs one of: 0 no, 1 maybe"),
        (
            {"labels": [False, True]},
            'labels: yes, no, true and false are no texts in YAML; write them in quotes, "yes"',
        ),
        ({"labels": ["no"]}, "labels: List should have at least 2 items"),
        (
            {"labels": None},
            "tasks toxicity and rudeness are both of expert 'tox', whose head has one",
        ),
        ({"metric": "f2"}, "task toxicity: unknown metric 'f2'"),
        ({"metric": "pearson"}, "task toxicity: metric: pearson is a metric of numbers"),
        ({"expert": "toxx"}, "no expert for task 'toxicity': no expert is named 'toxx'; did you mean 'tox'"),
        ({"expert": None}, "task toxicity: expert: null, but a classifier's answer comes from an expert's head"),
        ({"few_shot": 5}, "task toxicity: few_shot: a classifier reads a row's own text and nothing else"),
        ({"text": None}, "task toxicity: label without text: name the field of a row that holds its text"),
        ({"cluster": "page"}, "line 1: field 'page', which names the row's source, is not there"),
        ({"txt": "x"}, "tasks.toxicity.txt: unknown key; did you mean 'text'"),
    ],
)
def test_what_is_wrong_with_a_task_is_said_before_the_first_cell(
    desk: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], task: dict[str, Any], says: str
) -> None:
    changed = {key: value for key, value in {**desk["tasks"]["toxicity"], **task}.items()}
    if changed.get("labels", 0) is None:
        del changed["labels"]
        changed["metric"] = "mse"
    suite = {**desk, "tasks": {**desk["tasks"], "toxicity": changed}}
    capsys.readouterr()
    assert run(suite, tmp_path) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert says in line
    assert not list((tmp_path / "out").rglob("cells*"))


def test_a_name_that_nobody_knows_needs_fields_where_experts_are_classifiers(
    desk: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run({**desk, "tasks": {"toxicity": {"expert": "tox"}}}, tmp_path) == 2
    assert "unknown task 'toxicity'" in (said := capsys.readouterr().err)
    assert "needs text: the field of a row that it reads" in said


def test_a_tasks_settings_decide_its_own_cells_and_no_others(desk: dict[str, Any], tmp_path: Path) -> None:
    keys = []
    for changes in ({}, {"metric": "mcc"}, {"labels": ["yes", "no"]}, {"text_pair": "is_toxic"}):
        tasks = {**desk["tasks"], "toxicity": {**desk["tasks"]["toxicity"], **changes}}
        del tasks["rudeness"]  # of the same head, which has its labels in one order
        assert run({**desk, "tasks": tasks, "methods": ["average"]}, tmp_path, "--limit", "4") == 0
        keys.append({(method, task): row["key"] for (_, method, task), row in rows_of(tmp_path).items()})
    for before, after in itertools.combinations(keys, 2):
        assert {task for method, task in before if before[method, task] != after[method, task]} == {"toxicity"}
        assert all(
            before[method, "toxicity"] != after[method, "toxicity"] for method in ("pretrained", "experts", "average")
        )
