"""Every path to the hub that the documents show, on a hub that this test serves; then all again offline.

Each of both is one process: the hub's client and datasets read where the hub is when they are imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from safetensors.torch import load_file

from tests.support.families import Family
from tests.support.hub import Hub
from tests.support.hub_datasets import Splits, add_datasets
from tests.support.hub_models import ADAPTER, CLASSIFIERS, TOGETHER, add_models
from tests.support.interpreter import python
from tests.support.rows import write_router_rows
from tests.support.suites import score_alone
from twin_bench.__main__ import main
from twin_bench.data.registry import TASKS

pytestmark = pytest.mark.slow

SPLITS = [*((task, split) for task in TASKS for split in ("train", "validation")), ("mmlu", "dev")]
OWN = {
    **{"text": "sentence", "labels": ["unacceptable", "acceptable"], "metric": "mcc", "expert": "cola"},
    "data": {"hub": "me/sentences", "config": "cola", "split": "validation"},
}
"""A suite's task of a user's own, on a data set of theirs: CoLA's rows again."""
METRIC = b"""
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int32")))
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"share": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


class Told(NamedTuple):
    """What two processes told, online and offline, with the hub's rows, its models' folders and its requests."""

    online: dict[str, Any]
    offline: dict[str, Any]
    root: Path
    rows: dict[tuple[str, str], Splits]
    folders: dict[str, str]
    asked: int
    asked_offline: int


def recipes(router: Path, names: dict[str, str]) -> dict[str, Any]:
    """Return recipes, by the command that takes them. `names` gives models on the hub other names."""

    def named(*models: str) -> list[str]:
        return [names.get(model, model) for model in models]

    [base], experts = named("org/bert"), dict(zip(CLASSIFIERS, named(*CLASSIFIERS.values()), strict=True))
    cola, stsb, mnli = experts.values()
    twin = {"exclusive": {"density": 0.5}, "router": {"data": str(router), "epochs": 2}}
    mixed = [{"model": model, "parameters": {"weight": 1.0}} for model in (cola, stsb)]
    [adapted] = named(ADAPTER)
    return {
        "build-classifiers": {"base_model": base, "experts": experts, **twin},
        "merge-checkpoint": {"base_model": base, "experts": experts, "merge": {"method": "ties"}, "head": "mnli"},
        "merge-adapter": {
            **{"base_model": adapted, "experts": {"mnli": mnli}},
            **{"merge": {"method": "average"}, "as_adapter": True, "head": "mnli"},
        },
        "merge-mergekit": {"merge_method": "linear", "base_model": base, "models": mixed},
    }


@pytest.fixture(scope="module")
def told(families: Any, wide_llama: Family, tmp_path_factory: pytest.TempPathFactory) -> Told:
    root, classifiers = tmp_path_factory.mktemp("hub"), families("bert")
    write_router_rows(root / "language.jsonl", ["one"])
    files = recipes(classifiers.root / "router.jsonl", {})
    files["build-language"] = {
        **{"base_model": "org/llama", "experts": {"one": "org/llama-mmlu"}, "exclusive": {"density": 1.0}},
        "router": {"data": str(root / "language.jsonl"), "epochs": 1},
    }
    files["leaderboard-hub"] = {
        **{"name": "hub", "base_model": "bert-as-it-was-called", "experts": TOGETHER, "data": "hub"},
        **{"tasks": {**{task: {} for task in classifiers.experts}, "mine": OWN}, "methods": ["average"]},
    }
    plan = {"rows": SPLITS, "files": files, "plain": "org/llama-mmlu"}
    found, asked = [], []
    with Hub() as hub:
        rows = add_datasets(hub)
        folders = add_models(hub, classifiers, wide_llama, root)
        hub.add("me/sentences", hub.repositories["datasets", "nyu-mll/glue"].files(), kind="datasets")
        hub.add("evaluate-metric/share", {"share.py": METRIC}, kind="spaces")
        for offline in "01":
            plan |= {"out": str(root / f"out{offline}"), "done": str(root / f"done{offline}.json")}
            (root / "plan.json").write_text(json.dumps(plan))
            where = dict.fromkeys(("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"), offline)
            where |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / "home")}
            done = python("-m", "tests.support.hub_session", str(root / "plan.json"), OMP_NUM_THREADS="1", **where)
            assert done.returncode == 0, done.stderr
            found.append(json.loads((root / f"done{offline}.json").read_text()))
            asked.append(len(hub.log))
    return Told(*found, root, rows, folders, asked[0], asked[1] - asked[0])


def test_offline_everything_is_there_without_a_request(told: Told) -> None:
    assert told.asked > 100
    assert told.asked_offline == 0
    assert told.offline == told.online
    assert set(told.online["codes"].values()) == {0}
    assert told.online["metric"] == {"share": 0.75}


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_the_hubs(told: Told, task: str) -> None:
    for split in ("train", "validation", *(["dev"] if task == "mmlu" else [])):
        source = TASKS[task].hub_split(split)
        hubs = told.rows[source.dataset, source.configuration][source.split]
        assert told.online["rows"][f"{task}/{split}"] == TASKS[task].of_hub_split(hubs, split)


def test_built_and_merged_from_the_hub_or_from_folders_is_the_same(told: Told, families: Any, tmp_path: Path) -> None:
    for name, content in recipes(families("bert").root / "router.jsonl", told.folders).items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        assert main([name.partition("-")[0], str(tmp_path / f"{name}.yaml"), str(tmp_path / name)]) == 0
        ours = {file.relative_to(tmp_path): load_file(file) for file in (tmp_path / name).rglob("*.safetensors")}
        assert ours
        for file, tensors in ours.items():
            theirs = load_file(told.root / "out0" / file)
            assert theirs.keys() == tensors.keys()
            assert all(theirs[key].equal(tensor) for key, tensor in tensors.items())


def test_what_is_published_names_repositories(told: Told) -> None:
    out = told.root / "out0"
    settings = json.loads((out / "merge-adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/bert", "main")
    front = yaml.safe_load((out / "merge-checkpoint" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["org/bert", "org/bert-cola", "org/bert-stsb", "org/bert-mnli-lora"]


def test_a_leaderboard_of_the_hubs_rows_and_experts(told: Told, families: Any) -> None:
    out = told.root / "out0" / "leaderboard-hub"
    rows = {(row["method"], row["task"]): row for row in json.loads((out / "leaderboard.json").read_text())}
    for task, expert in families("bert").experts.items():
        assert rows["experts", task]["score"] == pytest.approx(
            score_alone(expert, task, out / "data" / "hub"), abs=1e-4
        )
        assert rows["experts", task]["n"] == 8
    assert rows["experts", "mine"]["score"] == rows["experts", "cola"]["score"]


def test_lm_evals_own_tasks_score_a_twin_as_they_score_its_expert(told: Told) -> None:
    """The twin has one expert at full rank, so it is that expert, which lm-eval loads from the hub itself."""
    twin, plain = told.online["scores"]["twin_merged"], told.online["scores"]["hf"]
    assert len(twin) == 19
    assert twin["truthfulqa_mc2"]["acc,none"] > 0
    for task, values in plain.items():
        assert twin[task] == pytest.approx(values, rel=1e-4), task
