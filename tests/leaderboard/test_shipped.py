"""The suites that come with the package: they are read, and run on tiny models under the names of the real ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import peft
import pytest
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.support.families import make_causal_family
from tests.support.models import WORDS, tiny_causal, tiny_causal_tokenizer, tiny_classifier, tiny_tokenizer
from tests.support.suites import rows_of
from twin_bench.data.glue import GLUE
from twin_bench.leaderboard.__main__ import main
from twin_bench.leaderboard.suite import read_suite
from twin_bench.paths import shipped_suites, tasks_directory
from twin_bench.twin.recipe import Recipe

LITERATURE = ("generative-qwen", "glue-flan-t5", "glue-flan-t5-lora", "glue-gpt2", "glue-roberta", "merge-llama")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return an empty working directory. A folder in it that is named like a model or a data set wins over the hub."""
    folder = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def data_set(folder: Path, rows: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write a data set as the hub has it: {configuration: {split: rows}}, and a card that names its files."""
    card = []
    for configuration, splits in rows.items():
        files = []
        for split, own in splits.items():
            file = folder / configuration / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in own))
            files.append({"split": split, "path": f"{configuration}/{split}.jsonl"})
        card.append({"config_name": configuration, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")


@pytest.fixture(scope="module")
def glue(here: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Write invented rows of the eight GLUE tasks as nyu-mll/glue; return them."""
    draw = random.Random(0)
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, task in GLUE.items():
        rows[name] = {}
        for split, size in (("train", 12), ("validation_matched" if name == "mnli" else "validation", 7)):
            texts = ({field: " ".join(draw.choices(WORDS, k=5)) for field in task.fields} for _ in range(size))
            labels = (index % task.num_labels if task.labels else draw.uniform(0, 5) for index in range(size))
            rows[name][split] = [
                {**text, "label": label, "idx": index} for index, (text, label) in enumerate(zip(texts, labels))
            ]
    data_set(here / "nyu-mll" / "glue", rows)
    return rows


def save(model: Any, tokenizer: Any, folder: str) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def board(name: str, out: Path, *arguments: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    assert main(["--suite", name, "--out", str(out / "out"), *arguments]) == 0
    return rows_of(out)


@pytest.mark.parametrize("name", shipped_suites())
def test_a_shipped_suite_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TWIN_BENCH_DATA", "TWIN_BENCH_EXPERTS"):
        monkeypatch.setenv(variable, "/somewhere")
    suite = read_suite(name)
    assert suite.name == name
    assert len(suite.entries()) > 5
    assert set(suite.expert_paths) >= {task.expert for task in suite.kinds.values()}


def test_the_literatures_suites_need_no_environment_and_their_settings_are_the_authors() -> None:
    suites = {name: read_suite(name) for name in LITERATURE}
    roberta, qwen = suites["glue-roberta"], suites["generative-qwen"]
    entries = {entry.label: entry for entry in roberta.entries()}
    assert roberta.expert_paths["sst2"] == "lu-vae/roberta-glue/sst2/roberta-base_lr1e-05"
    assert roberta.max_length == 128
    assert entries["ties"].options == {"scaling": 0.7, "density": 0.1}
    assert entries["twin"].options["shared"] == {"method": "task_arithmetic", "scaling": 0.29}
    assert entries["twin"].options["exclusive"]["density"] == 0.1
    (twin,) = (entry for entry in qwen.entries() if entry.label == "twin")
    assert twin.options["exclusive"]["rank"] == 8
    assert twin.options["shared"]["scaling"] == 0.3
    assert {task.metric for task in suites["glue-gpt2"].kinds.values()} == {"acc"}


@pytest.fixture(scope="module")
def classifiers(here: Path, glue: Any) -> Callable[[str, str, dict[str, str]], None]:
    """Return a function that saves a tiny base model and experts of a kind under the names that a suite gives."""
    window = {"roberta": {"max_position_embeddings": 130}, "gpt2": {"n_positions": 512}}
    tokenizer = tiny_tokenizer("distilbert")  # as RoBERTa's and GPT-2's, it tells no second text from the first

    def lay_out(kind: str, base_model: str, experts: dict[str, str]) -> None:
        base = tiny_classifier(kind, config=window[kind])
        save(base, tokenizer, base_model)
        for seed, (task, path) in enumerate(experts.items(), 1):
            expert = tiny_classifier(kind, GLUE[task].num_labels, seed, like=base, config=window[kind])
            save(expert, tokenizer, path)

    return lay_out


def test_roberta_runs_on_tiny_models_under_the_papers_names(classifiers: Any, tmp_path: Path) -> None:
    suite = read_suite("glue-roberta")
    classifiers("roberta", suite.base_model, suite.expert_paths)
    rows = board("glue-roberta", tmp_path, "--methods", "ties,twin", "--limit", "5")
    assert {(protocol, method) for protocol, method, _ in rows} == {
        *((protocol, method) for protocol in suite.protocol for method in ("pretrained", "experts", "twin")),
        *((protocol, "ties") for protocol in ("paper", "standard")),
    }
    assert {task for _, _, task in rows} == set(GLUE)
    assert rows["paper", "twin", "rte"]["n"] == 5


def test_gpt2_runs_on_tiny_models_under_fusionbenchs_names(classifiers: Any, tmp_path: Path) -> None:
    suite = read_suite("glue-gpt2")
    classifiers("gpt2", suite.base_model, suite.expert_paths)
    rows = board("glue-gpt2", tmp_path, "--methods", "task_arithmetic,twin", "--limit", "5")
    assert {row["metric"] for row in rows.values()} == {"acc"}
    assert {row["score"] % 20 for row in rows.values()} == {0}  # of five rows, as accuracy has it, CoLA's too
