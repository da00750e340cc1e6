"""Rows that no model answers: the best constant answer by the training labels, and an article's first sentences."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from tests.support.families import Family
from tests.support.models import WORDS
from tests.support.rows import write_generative_rows
from tests.support.suites import rows_of, run
from tests.support.task_files import CHOICE, TEXT, own_task
from twin_bench.contenders.references import sentences
from twin_bench.results.board import Leaderboard
from twin_bench.results.stored import load_leaderboard

NO_YES = {"expert": "cola", "text": "said", "labels": ["no", "yes"]}
LABELS: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "right": ({**NO_YES, "metric": "acc"}, 9 * [1] + 3 * [0], 4 * [1] + 11 * [0]),
    "tied": ({**NO_YES, "metric": "acc"}, [1, 0, 1, 0], 10 * [1] + 5 * [0]),
    "positive": ({**NO_YES, "metric": "f1"}, 8 * [0] + 4 * [1], 10 * [1] + 5 * [0]),
    "macro": (
        {"expert": "mnli", "text": "said", "labels": ["a", "b", "c"], "metric": "f1_macro"},
        6 * [2] + 3 * [0] + 3 * [1],
        7 * [0] + 3 * [1] + 5 * [2],
    ),
    "ranked": ({**NO_YES, "metric": "auroc"}, 9 * [1] + 3 * [0], 4 * [1] + 11 * [0]),
    "precise": ({**NO_YES, "metric": "average_precision"}, 9 * [1] + 3 * [0], 4 * [1] + 11 * [0]),
    "number": ({"expert": "stsb", "text": "said", "metric": "mse"}, [1.0, 2.0, 4.5], [0.5, 4.0, 3.0, 1.0]),
    "alike": ({"expert": "stsb", "text": "said", "metric": "pearson"}, [1.0, 2.0, 4.5], [0.5, 4.0, 3.0, 1.0]),
    "untrained": ({**NO_YES, "metric": "acc"}, [], 6 * [1] + 4 * [0]),
}
"""Tasks of classifiers: settings, training labels and scored labels, of which other ones are the most frequent."""


@pytest.fixture(scope="module")
def classifiers(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    folder, draw = tmp_path_factory.mktemp("labels"), random.Random(0)
    for task, (_, train, scored) in LABELS.items():
        (folder / "data" / task).mkdir(parents=True)
        for split, labels in (("train", train), ("validation", scored)):
            rows = [{"said": " ".join(draw.choices(WORDS, k=5)), "label": label} for label in labels]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            if rows:
                (folder / "data" / task / f"{split}.jsonl").write_text(text)
    tasks = {task: settings for task, (settings, *_) in LABELS.items()}
    assert run({**tiny, "data": str(folder / "data"), "tasks": tasks, "methods": []}, folder) == 0
    return load_leaderboard(folder / "out")


def test_training_labels_decide_the_constant_answer_of_classifiers(classifiers: Leaderboard) -> None:
    answers = {"right": 1, "tied": 0, "positive": 0, "macro": 2, "number": 2.5, "alike": 2.5}
    answers |= {"ranked": [0.25, 0.75], "precise": [0.25, 0.75]}
    scored = {task: np.array(labels) for task, (_, _, labels) in LABELS.items()}
    expected = {
        "right": 100 * accuracy_score(scored["right"], np.ones(15)),
        "tied": 100 * accuracy_score(scored["tied"], np.zeros(15)),
        "positive": 0,  # no row of class 1 is found
        "macro": 100 * f1_score(scored["macro"], np.full(15, 2), average="macro"),
        "ranked": 50,  # all rows are tied
        "precise": 100 * average_precision_score(scored["precise"], np.full(15, 0.75)),
        "number": float(np.mean((scored["number"] - 2.5) ** 2)),
        "alike": 0,
    }
    cells = classifiers.cells[classifiers.cells["method"] == "constant"].set_index("task")
    assert cells["score"].to_dict() == pytest.approx(expected)
    for task, answer in answers.items():
        frame = classifiers.rows("standard", "constant", task)
        assert [np.array(own).tolist() for own in frame["prediction"]] == len(scored[task]) * [answer]
        assert list(frame["target"]) == scored[task].tolist()
    assert (cells["parameters"] == 0).all()
    assert (cells["stored_bytes"] == 0).all()
    assert cells.loc["number", ["higher_is_better", "percent"]].to_list() == [False, False]


def test_without_training_rows_there_is_no_constant_answer_and_no_gain(classifiers: Leaderboard) -> None:
    cells = classifiers.cells.set_index(["method", "task"])
    assert ("constant", "untrained") not in cells.index
    assert cells["gain"]["pretrained", "untrained"] is None
    assert cells["floor"]["pretrained", "untrained"] is None
    assert cells["score"]["pretrained", "untrained"] is not None
    assert classifiers.tasks.set_index("task")["floor"].isna().to_dict() == {
        task: task == "untrained" for task in LABELS
    }


ARTICLES = {
    "Mr. Smith met the U.S. President at 5 p.m. on Friday. J. K. Rowling left. Nobody asked why. He slept.": (
        "Mr. Smith met the U.S. President at 5 p.m. on Friday. J. K. Rowling left. Nobody asked why."
    ),
    'He said "stop." Then he ran! Was it 3.5 miles? Nobody knows.': ('He said "stop." Then he ran! Was it 3.5 miles?'),
    "Two sentences alone. The dog sits on the mat": "Two sentences alone. The dog sits on the mat",
}
SUMMARIES = ["Mr. Smith met the President. J. K. Rowling left.", "Then he ran! The cat.", "The dog sits on the mat."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two.\n\nThree.", ["One.", "Two.", "Three."]),
        (
            "(CNN)No. 7 won. Gov. Fox and Dr. Hay of St. Paul did not",
            ["(CNN)No. 7 won.", "Gov. Fox and Dr. Hay of St. Paul did not"],
        ),
        ('"Go." (She did.) Fine...  Really?!', ['"Go."', "(She did.)", "Fine...", "Really?!"]),
        ("at 7 p.m. sharp, e.g. today", ["at 7 p.m. sharp, e.g. today"]),
        ("  ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def texts(wide_llama: Family, tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    folder = tmp_path_factory.mktemp("texts")
    data = write_generative_rows(folder / "data")
    for split, right in (("train", 3), ("validation", 0)):  # D of the training rows, A of the scored ones
        file = data / "mmlu" / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write(file, [{**row, "answer": right if place else 1} for place, row in enumerate(rows)])
    pairs = zip(ARTICLES, SUMMARIES, strict=True)
    write(data / "cnn_dailymail" / "validation.jsonl", [{"article": a, "highlights": h} for a, h in pairs])
    splits = {"training_split": "train", "fewshot_split": "train"}
    free = {**TEXT, "doc_to_target": "{{question}}"}
    for name, config in (("choice", CHOICE), ("letters", TEXT), ("free", free)):
        own_task(folder, name, {**config, **splits}, answers=3)
    for name in ("choice", "letters"):  # the third option of most training rows, of the scored ones the first
        asked = [
            {"question": f"train {row}", "options": ["A", "B", "C"], "answer": 2 if row else 1} for row in range(9)
        ]
        write(folder / f"{name}-train.jsonl", asked)
    many = [{"question": f"train {row}", "options": ["A", "B", "C"], "answer": 1} for row in range(30)]
    write(folder / "free-train.jsonl", many)
    experts = wide_llama.recipe["experts"]
    suite = {
        "name": "texts",
        "base_model": wide_llama.recipe["base_model"],
        "experts": {"mmlu": experts["mmlu"]},
        "data": str(data),
        "include_path": str(folder),
        "tasks": {
            "mmlu": {"few_shot": 0},
            "cnn_dailymail": {"expert": None},
            "choice": {"expert": "mmlu"},
            "letters": {"expert": "mmlu", "metric": "exact_match,first"},
            "free": {"expert": "mmlu"},
        },
        "methods": [],
    }
    assert run(suite, folder) == 0
    assert {method for _, method, _ in rows_of(folder)} == {"pretrained", "experts", "constant", "lead_3"}
    return load_leaderboard(folder / "out")


def test_training_answers_decide_the_constant_answer_of_language_models(texts: Leaderboard) -> None:
    cells = texts.cells[texts.cells["method"] == "constant"].set_index("task")
    answers = {"mmlu": "D", "choice": 2, "letters": "C", "free": "", "cnn_dailymail": ""}
    expected = {"mmlu": 0, "choice": 100 * 2 / 7, "letters": 100 * 2 / 7, "free": 0, "cnn_dailymail": 0}
    assert cells["score"].to_dict() == pytest.approx(expected)
    for task, answer in answers.items():
        assert set(texts.rows("standard", "constant", task)["prediction"]) == {answer}
    assert texts.tasks.set_index("task")["floor"].to_dict() == pytest.approx(expected)


def test_an_articles_first_three_sentences_are_a_row_and_no_floor(texts: Leaderboard) -> None:
    frame = texts.rows("standard", "lead_3", "cnn_dailymail")
    assert sorted(frame["prediction"]) == sorted(ARTICLES.values())
    scorer, summaries = RougeScorer(["rouge2"], use_stemmer=True), dict(zip(ARTICLES.values(), SUMMARIES, strict=True))
    by_hand = [scorer.score(summaries[said], said)["rouge2"].fmeasure for said in frame["prediction"]]
    assert list(frame["score"]) == pytest.approx(by_hand)
    assert min(by_hand) > 0
    (cell,) = texts.cells[texts.cells["method"] == "lead_3"].to_dict("records")
    assert (cell["task"], cell["floor"], cell["n"]) == ("cnn_dailymail", 0, 3)
    assert cell["score"] == pytest.approx(100 * np.mean(by_hand))
