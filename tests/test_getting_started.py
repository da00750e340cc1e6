"""What the README says of a user's own experts and tasks, done in a folder outside the checkout."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import peft
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from sklearn.metrics import f1_score

from tests.support.families import Family
from tests.support.models import WORDS, tiny_tokenizer
from twin_bench import cli
from twin_bench.leaderboard.suite import read_suite
from twin_bench.twin.directory import read_manifest
from twin_bench.twin.recipe import read_recipe
from twin_bench_lm_eval.model import TwinMerged

PLUGIN = '''
from twin_bench import Classification, GenerativeTask, Item, TaskVectors, merge_method, metric, task


@merge_method(title="Louder", paper="", track="data-free")
def louder(vectors: TaskVectors, *, scaling: float = 2.0):
    """theta_0 + scaling * the mean task vector."""
    return vectors.merged(lambda name, base, taus: base + scaling * taus.mean(dim=0))


@metric(answers="label")
def ones(references, answers):
    """The fraction of rows that are answered with label 1."""
    return (answers == 1).mean()


@task
def shouting():
    return Classification("shouting", ("said",), "ones", labels=("calm", "loud"))


@task
def riddles():
    return GenerativeTask(
        name="riddles",
        metric="exact_match",
        fields=("riddle", "solution"),
        item=lambda row: Item(f"{row['riddle']} :", row["solution"], options=0),
        instructions=lambda row: "",
        hub=None,
        shots=1,
        max_new_tokens=3,
    )
'''


def write(rows: Path, make: Callable[[int], dict[str, Any]], **splits: int) -> None:
    rows.mkdir(parents=True)
    for split, size in splits.items():
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(make(n)) + "\n" for n in range(size)))


@pytest.fixture
def words() -> Callable[[int], str]:
    draw = random.Random(0)
    return lambda count: " ".join(draw.choices(WORDS, k=count))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty working directory, with a plugin in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    return tmp_path


def run(*arguments: str) -> None:
    assert cli.main([*arguments]) == 0


def scores(out: Path = Path("results")) -> dict[tuple[str, str], float]:
    return {(row["method"], row["task"]): row["score"] for row in json.loads((out / "leaderboard.json").read_text())}


def adapter(base: Any, folder: Path, seed: int, **config: Any) -> None:
    """Save a LoRA adapter whose factors are drawn."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **config))
    adapted.save_pretrained(folder)


def test_classifiers(folder: Path, families: Any, words: Callable[[int], str]) -> None:
    family: Family = families("bert")
    for name, source in (("tox", "cola"), ("similar", "stsb"), ("topic", "mnli"), ("base", "base")):
        shutil.copytree(family.root / source, Path("work", "models", name))
    config = Path("work", "models", "tox", "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": {"0": "fine", "1": "toxic"}}))
    write(Path("work/rows/toxicity"), lambda n: {"id": n, "comment": words(5), "is_toxic": ["toxic", "fine"][n % 2]}, train=12, validation=9)
    write(Path("work/rows/similarity"), lambda n: {"a": words(4), "b": words(4), "score": n / 3}, train=12, validation=9)
    write(Path("work/rows/topic"), lambda n: {"body": words(6), "topic": n % 3}, train=12, test=9)
    write(Path("work/rows/shouting"), lambda n: {"said": words(3), "label": n % 2}, validation=8)
    run("init", "work", "--plugin", "my_plugin.py")
    print(Path("work/suite.yaml").read_text(), Path("work/recipe.yaml").read_text())


def test_language_models(folder: Path, wide_llama: Family, words: Callable[[int], str]) -> None:
    shutil.copytree(wide_llama.root / "base", "work/base")
    for seed, name in enumerate(("math", "code")):
        pass
