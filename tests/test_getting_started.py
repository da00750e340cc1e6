"""What the README says of a user's own experts and tasks, done in a folder outside the checkout."""

from __future__ import annotations

import json
import random
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import peft
import pytest
import torch
import transformers
import yaml
from lm_eval.tasks import TaskManager
from sklearn.metrics import matthews_corrcoef

import twin_bench
from tests.support.families import Family, built
from tests.support.interpreter import ROOT
from tests.support.models import WORDS, tiny_tokenizer
from twin_bench import cli
from twin_bench.data.metrics import REGISTRY as METRICS
from twin_bench.data.registry import TASKS
from twin_bench.leaderboard.suite import read_suite
from twin_bench.merging.registry import REGISTRY
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
    return Classification("tox_shouting", ("said",), "ones", labels=("calm", "loud"))


@task
def riddles():
    return GenerativeTask(
        name="riddles",
        metric="exact_match",
        fields=("riddle", "solution"),
        item=lambda row: Item(f"{row['riddle']} :", row["solution"], options=0),
        instructions=lambda row: "",
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


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a plugin's file. What it registers is taken out again."""
    file = tmp_path_factory.mktemp("plugins") / "my_plugin.py"
    file.write_text(PLUGIN)
    twin_bench.methods()  # loads all others
    registries: list[Any] = [REGISTRY, METRICS, TASKS]
    before = [dict(registry) for registry in registries]
    yield str(file)
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> None:
    assert cli.main([*arguments]) == 0


def scores(out: Path = Path("results")) -> dict[tuple[str, str], float]:
    return {(row["method"], row["task"]): row["score"] for row in json.loads((out / "leaderboard.json").read_text())}


def test_classifiers(folder: Path, plugin: str, families: Any, words: Callable[[int], str]) -> None:
    family: Family = families("bert")
    for name, source in (("tox", "cola"), ("similar", "stsb"), ("topic", "mnli"), ("base", "base")):
        shutil.copytree(family.root / source, Path("work", "models", name))
    config = Path("work/models/tox/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": {"0": "fine", "1": "toxic"}}))
    rows = Path("work/rows")
    write(
        rows / "toxicity",
        lambda n: {"id": n, "comment": words(5), "is_toxic": ("toxic", "fine")[n % 2]},
        train=12,
        validation=9,
    )
    write(rows / "similarity", lambda n: {"a": words(4), "b": words(4), "score": n / 3}, train=12, validation=9)
    write(rows / "topic", lambda n: {"body": words(6), "topic": n % 3}, train=12, test=9)
    write(rows / "tox_shouting", lambda n: {"said": words(3), "label": n % 2}, validation=8)
    run("init", "work", "--plugin", plugin)
    suite = read_suite("work/suite.yaml")
    assert {name: (t.expert, t.fields, t.label, t.labels, t.metric, t.split) for name, t in suite.kinds.items()} == {
        "similarity": ("similar", ("a", "b"), "score", (), "pearson_spearman", None),
        "topic": ("topic", ("body",), "topic", (0, 1, 2), "acc", "test"),
        "tox_shouting": ("tox", ("said",), "label", ("calm", "loud"), "ones", None),
        "toxicity": ("tox", ("comment",), "is_toxic", ("fine", "toxic"), "acc", None),
    }
    run("build", "work/recipe.yaml", "my-twin")
    assert read_manifest(Path("my-twin"))["router"]["selection_rows"] > 0
    edit(Path("work/suite.yaml"), ("metric: acc  # others", "metric: mcc  # others"), ("average", "louder"))
    run("leaderboard", "--suite", "work/suite.yaml", "--out", "results", "--methods", "louder,ties,twin")
    found = scores()
    methods = {"pretrained", "experts", "constant", "louder", "ties", "twin"}
    everything = {(method, task) for method in methods for task in suite.kinds}
    assert found.keys() == everything - {("constant", "tox_shouting")}  # it has no training rows
    for task, name in (("toxicity", "cola"), ("topic", "mnli"), ("tox_shouting", "cola")):
        read = suite.kinds[task]
        lines = (rows / task / f"{read.split or 'validation'}.jsonl").read_text().splitlines()
        labels = [read.target(json.loads(line)) for line in lines]
        answers = [int(logits.argmax()) for logits in asked(family.experts[name], lines, read.fields)]
        score = sum(answers) / len(answers) if read.metric == "ones" else matthews_corrcoef(labels, answers)
        assert found["experts", task] == pytest.approx(100 * score)


def edit(file: Path, *changes: tuple[str, str]) -> None:
    """Change a file that a command wrote, as its comments tell the user to."""
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)


def asked(model: Any, lines: list[str], fields: tuple[str, ...]) -> list[torch.Tensor]:
    """Return a classifier's logits of rows, computed directly."""
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        return [
            model(**tokenizer(*(row[field] for field in fields), return_tensors="pt")).logits[0]
            for row in map(json.loads, lines)
        ]


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} :",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "answer",
    "test_split": "test",
    "training_split": "train",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def test_language_models(folder: Path, plugin: str, wide_llama: Family, words: Callable[[int], str]) -> None:
    shutil.copytree(wide_llama.root / "base", "models/base")
    for seed, name in enumerate(("maths", "code")):
        torch.manual_seed(seed)
        options: Any = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
        base = transformers.AutoModelForCausalLM.from_pretrained("models/base")
        peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(f"adapters/{name}")
    rows = Path("work/rows")

    def question(number: int) -> dict[str, Any]:
        return {"question": words(5), "options": ["A", "B", "C"], "answer": number % 3}

    write(rows / "maths-exam", question, train=9, test=7)
    write(rows / "trivia", question, train=9, test=7)
    write(rows / "riddles", lambda n: {"riddle": words(4), "solution": "ABC"[n % 3]}, train=9, validation=7)
    Path("work/tasks").mkdir()
    for name in ("maths-exam", "trivia"):
        files = {split: str(rows / name / f"{split}.jsonl") for split in ("train", "test")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, **CHOICE}
        Path(f"work/tasks/{name}.yaml").write_text(yaml.safe_dump(task))
    run("init", "work", "--experts", "adapters", "--plugin", plugin)
    assert read_recipe(Path("work/recipe.yaml")).router is None  # nobody's rows are the expert code's
    suite = read_suite("work/suite.yaml")
    assert {name: task.expert for name, task in suite.kinds.items()} == {
        "maths-exam": "maths",
        "riddles": None,
        "trivia": None,
    }
    edit(Path("work/suite.yaml"), ("riddles:\n    expert: null", "riddles:\n    expert: code"), ("# - twin", "- twin"))
    run("leaderboard", "--suite", "work/suite.yaml", "--out", "results", "--methods", "louder,twin")
    found = scores()
    assert found.keys() == {(m, t) for m in ("pretrained", "constant", "louder", "twin") for t in suite.kinds} | {
        ("experts", task) for task in ("maths-exam", "riddles")
    }


def test_a_classifiers_own_task_file(folder: Path, families: Any, words: Callable[[int], str]) -> None:
    """A twin of one expert, of full rank, is that expert."""
    family: Family = families("bert")
    text = (ROOT / "docs" / "lm-eval.md").read_text().partition("    # my-tasks/toxicity.yaml\n")[2]
    Path("my-tasks").mkdir()
    Path("my-tasks/toxicity.yaml").write_text(textwrap.dedent(text.partition("\n\n")[0]))
    texts = [{"text": words(5), "task": "tox"} for _ in range(24)]
    lines = [json.dumps(row) for row in texts]
    answers = [int(logits.argmax()) for logits in asked(family.experts["cola"], lines, ("text",))]
    labels = [answer if number % 4 else 1 - answer for number, answer in enumerate(answers)]
    write(Path("my-rows"), lambda n: {**texts[n], "label": labels[n]}, toxicity=24)
    recipe = {"base_model": family.recipe["base_model"], "experts": {"tox": family.recipe["experts"]["cola"]}}
    router = {"data": "my-rows/toxicity.jsonl", "epochs": 1}
    twin = built({**recipe, "exclusive": {"density": 1}, "router": router}, Path("my-twin"))
    found = lm_eval.simple_evaluate(
        TwinMerged(str(twin), device="cpu"),
        tasks=["toxicity"],
        task_manager=TaskManager(include_path="my-tasks", include_defaults=False),
        bootstrap_iters=1,
    )
    assert found["results"]["toxicity"]["acc,none"] == 0.75
