"""How a tiny suite is run, and what models score on their own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef

from tests.support.models import tiny_tokenizer
from twin_bench.leaderboard.__main__ import main


def run(suite: dict[str, Any], folder: Path, *arguments: str) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
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
