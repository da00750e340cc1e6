"""The data sets of this project's tasks and of some of lm-eval's, in their schemas on the hub, with invented rows."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from tests.support.hub import Hub
from tests.support.models import WORDS
from twin_bench.data.classification import Classification
from twin_bench.data.glue import GLUE

Splits = dict[str, list[dict[str, Any]]]
TEXT, INTEGER = Value("string"), Value("int32")
CHOICES = Sequence({"text": TEXT, "label": TEXT})
TARGETS = {"choices": Sequence(TEXT), "labels": Sequence(INTEGER)}


def add_datasets(hub: Hub) -> dict[tuple[str, str], Splits]:
    """Add the data sets to a hub, and return the rows of each by (data set, configuration) and split."""
    draw = random.Random(0)
    found: dict[tuple[str, str], Splits] = {}
    files: dict[str, dict[str, bytes]] = {}
    for data_set, configuration, features, splits in (*_glue(draw), *_generative(draw), *_of_lm_eval(draw)):
        found[data_set, configuration] = splits
        for split, rows in splits.items():
            path = f"{configuration}/{split}-00000-of-00001.parquet"
            files.setdefault(data_set, {})[path] = parquet(rows, features)
    for data_set, content in files.items():
        splits_of = {configuration: list(splits) for (name, configuration), splits in found.items() if name == data_set}
        hub.add(data_set, {"README.md": card(splits_of), **content}, kind="datasets")
    return found


def card(splits: Mapping[str, list[str]]) -> bytes:
    """Return a data set's README.md, which says where each configuration's splits are."""
    configurations = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in own]}
        for name, own in splits.items()
    ]
    return f"---\n{yaml.safe_dump({'configs': configurations})}---\n\n# Invented rows\n".encode()


def parquet(rows: list[dict[str, Any]], features: Mapping[str, Any]) -> bytes:
    """Return rows as the parquet file that the hub has of them."""
    file = io.BytesIO()
    Dataset.from_dict({name: [row[name] for row in rows] for name in features}, Features(features)).to_parquet(file)
    return file.getvalue()


def _text(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def _glue(draw: random.Random) -> list[tuple[str, str, Mapping[str, Any], Splits]]:
    found: list[tuple[str, str, Mapping[str, Any], Splits]] = []
    wnli = Classification("wnli", ("sentence1", "sentence2"), "acc", ("not_entailment", "entailment"))
    for task in (*GLUE.values(), wnli):  # WNLI is a task of lm-eval's, not of this project's.
        label = Value("float32") if task.is_regression else ClassLabel(names=list(task.labels))
        names = ["train", "validation", "test"]
        if task.name == "mnli":
            names = [
                "train",
                *(f"{split}_{kind}" for split in ("validation", "test") for kind in ("matched", "mismatched")),
            ]
        splits: Splits = {}
        for split in names:
            splits[split] = []
            for index in range(40 if split == "train" else 8):
                value: float = draw.randrange(21) / 4 if task.is_regression else draw.randrange(task.num_labels)
                texts = {field: _text(draw, draw.randint(3, 7)) for field in task.fields}
                splits[split].append({**texts, "label": -1 if "test" in split else value, "idx": index})
        features = {**dict.fromkeys(task.fields, TEXT), "label": label, "idx": INTEGER}
        found.append(("nyu-mll/glue", task.name, features, splits))
    return found


def _generative(draw: random.Random) -> list[tuple[str, str, Mapping[str, Any], Splits]]:
    def mmlu(subject: str) -> dict[str, Any]:
        options = [_text(draw, 2) for _ in range(4)]
        return {"question": _text(draw, 4), "subject": subject, "choices": options, "answer": draw.randrange(4)}

    def question() -> dict[str, Any]:
        options = [f"{_text(draw, 2)} {number}" for number in range(5)]
        first, all_true = [1, 0, 0], [1, 1, 0, 0, 0]
        return {
            "question": _text(draw, 4),
            "mc1_targets": {"choices": options[:3], "labels": first},
            "mc2_targets": {"choices": options, "labels": all_true},
        }

    def bbq(index: int) -> dict[str, Any]:
        answers = {f"ans{number}": _text(draw, 2) for number in range(3)}
        texts = {"context": _text(draw, 5), "question": _text(draw, 4), **answers}
        return {**texts, "category": "Age", "question_index": str(index), "label": draw.randrange(3)}

    def article(index: int) -> dict[str, Any]:
        return {"article": _text(draw, 30), "highlights": _text(draw, 6), "id": str(index)}

    subjects = {"anatomy": [mmlu("anatomy") for _ in range(12)], "virology": [mmlu("virology") for _ in range(12)]}
    both = [*subjects["anatomy"], *subjects["virology"]]
    letters = ClassLabel(names=list("ABCD"))
    mmlu_features = {"question": TEXT, "subject": TEXT, "choices": Sequence(TEXT), "answer": letters}
    answers = ClassLabel(names=["ans0", "ans1", "ans2"])
    bbq_texts = ("category", "question_index", "context", "question", "ans0", "ans1", "ans2")
    return [
        *(
            ("cais/mmlu", name, mmlu_features, {"test": rows[5:], "validation": rows[5:7], "dev": rows[:5]})
            for name, rows in {**subjects, "all": both}.items()
        ),
        (
            "truthfulqa/truthful_qa",
            "multiple_choice",
            {"question": TEXT, "mc1_targets": TARGETS, "mc2_targets": TARGETS},
            {"validation": [question() for _ in range(20)]},
        ),
        (
            "oskarvanderwal/bbq",
            "All",
            {**dict.fromkeys(bbq_texts, TEXT), "label": answers},
            {"test": [bbq(index) for index in range(20)]},
        ),
        (
            "abisee/cnn_dailymail",
            "3.0.0",
            dict.fromkeys(("article", "highlights", "id"), TEXT),
            {split: [article(index) for index in range(6)] for split in ("train", "validation", "test")},
        ),
    ]


def _of_lm_eval(draw: random.Random) -> list[tuple[str, str, Mapping[str, Any], Splits]]:
    def sum_of_two() -> dict[str, str]:
        first, second = draw.randrange(50), draw.randrange(50)
        return {"question": f"{first} and {second}?", "answer": f"{first} + {second}\n#### {first + second}"}

    def arc(index: int) -> dict[str, Any]:
        options = {"text": [_text(draw, 2) for _ in range(4)], "label": list("ABCD")}
        return {"id": str(index), "question": _text(draw, 5), "choices": options, "answerKey": draw.choice("ABCD")}

    splits = ("train", "validation", "test")
    return [
        (
            "openai/gsm8k",
            "main",
            {"question": TEXT, "answer": TEXT},
            {split: [sum_of_two() for _ in range(8)] for split in ("train", "test")},
        ),
        (
            "allenai/ai2_arc",
            "ARC-Easy",
            {"id": TEXT, "question": TEXT, "choices": CHOICES, "answerKey": TEXT},
            {split: [arc(index) for index in range(8)] for split in splits},
        ),
        (
            "EleutherAI/wikitext_document_level",
            "wikitext-2-raw-v1",
            {"page": TEXT},
            {split: [{"page": f" = {_text(draw, 2)} = \n {_text(draw, 40)} \n"} for _ in range(3)] for split in splits},
        ),
    ]
