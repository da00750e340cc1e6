"""What the leaderboard's tests share: a tiny suite's rows, how one is run, and what models score on their own."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef

from tests.conftest import WORDS, Family, tiny_tokenizer
from twin_bench.leaderboard.__main__ import main

TASKS = ("cola", "stsb", "mnli")


def write_rows(root: Path) -> Path:
    """Write rows whose labels follow from the words, so that a random model's score is no constant."""
    draw = random.Random(0)
    for task in TASKS:
        (root / task).mkdir(parents=True)
        for split, count in (("train", 40), ("validation", 30)):
            with (root / task / f"{split}.jsonl").open("w") as file:
                for index in range(count):
                    first, second = (" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(2))
                    row: dict[str, Any] = {"idx": index}
                    if task == "cola":
                        row |= {"sentence": first, "label": int("the" in first)}
                    elif task == "stsb":
                        row |= {"sentence1": first, "sentence2": second, "label": draw.uniform(0, 5)}
                    else:
                        row |= {"premise": first, "hypothesis": second, "label": len(second) % 3}
                    file.write(json.dumps(row) + "\n")
    return root


@pytest.fixture(scope="session")
def family(families: Any) -> Family:
    return families("bert")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return rows that no test changes."""
    return write_rows(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture(scope="session")
def tiny(family: Family, data: Path) -> dict[str, Any]:
    """Return a suite without its methods."""
    return {
        "name": "tiny",
        "base_model": family.recipe["base_model"],
        "experts": family.recipe["experts"],
        "data": str(data),
        "tasks": list(TASKS),
    }


def run(suite: dict[str, Any], folder: Path, *arguments: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return main(["--suite", str(folder / "suite.yaml"), "--out", str(folder / "out"), *arguments])


def rows_of(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = json.loads((folder / "out" / "leaderboard.json").read_text())
    return {(row["protocol"], row["method"], row["task"]): row for row in rows}


def score_alone(model: Any, task: str, data: Path) -> float:
    """Return a model's score as transformers, scikit-learn and scipy alone give it."""
    tokenizer = tiny_tokenizer()
    rows = [json.loads(line) for line in (data / task / "validation.jsonl").read_text().splitlines()]
    fields = {"cola": ("sentence",), "stsb": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}[task]
    answers = []
    with torch.no_grad():
        for row in rows:
            inputs = tokenizer(*(row[field] for field in fields), return_tensors="pt")
            logits = model(**inputs).logits[0]
            answers.append(float(logits[0]) if task == "stsb" else int(logits.argmax()))
    labels = [row["label"] for row in rows]
    if task == "cola":
        return 100 * matthews_corrcoef(labels, answers)
    if task == "stsb":
        return 50 * (pearsonr(labels, answers).statistic + spearmanr(labels, answers).statistic)
    return 100 * accuracy_score(labels, answers)


def with_backbone(expert: Any, parameters: dict[str, torch.Tensor]) -> Any:
    model = copy.deepcopy(expert)
    model.load_state_dict(parameters, strict=False)
    return model
