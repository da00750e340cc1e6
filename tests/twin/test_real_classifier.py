"""Real rows, a real encoder, real experts: the twin against models that transformers and peft make alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from twin_bench import TwinModel
from twin_bench.checkpoints.hub import model_directory
from twin_bench.data.glue import GLUE
from twin_bench.data.metrics import score
from twin_bench.data.rows import read_rows, split_path
from twin_bench.leaderboard.__main__ import main as leaderboard
from twin_bench.paths import tasks_directory
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe
from twin_bench_lm_eval.classifier import ClassifierTwin

pytestmark = [pytest.mark.real, pytest.mark.slow]
TASKS = ("cola", "stsb", "mnli")
BASE = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def twin_directory(real_data: Path, real_experts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("real") / "twin"
    recipe = {
        "base_model": BASE,
        "experts": {task: str(real_experts / "minilm" / task) for task in TASKS},
        "shared": {"method": "task_arithmetic", "scaling": 0.29},
        "router": {"data": str(real_data), "layer": 1, "max_rows": 150, "paper": False},
    }
    build_twin(Recipe.model_validate(recipe), directory)
    return directory


def rows_of(data: Path, task: str, count: int) -> list[tuple[str, str | None]]:
    rows = read_rows(split_path(data, task), GLUE[task])
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    return [GLUE[task].texts(rows[index]) for index in picked.tolist()]


def expert_alone(task: str, experts: Path) -> Any:
    """Return one expert as transformers and peft load it."""
    model = AutoModelForSequenceClassification.from_pretrained(model_directory(BASE), num_labels=GLUE[task].num_labels)
    return PeftModel.from_pretrained(model, str(experts / "minilm" / task)).merge_and_unload().eval()


def test_routed_weights_fuse_exactly_in_a_mixed_batch(
    twin_directory: Path, real_data: Path, real_experts: Path
) -> None:
    """Against one dense model a row: theta_s and the factors as saved, multiplied out and summed here."""
    twin = TwinModel.from_pretrained(twin_directory)
    texts = [(text, task) for task in TASKS for text in rows_of(real_data, task, 5)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1)).tolist()
    texts = [texts[index] for index in order]
    tasks = [task for _, task in texts]
    encoded = twin.encode([text for text, _ in texts], max_length=128)
    weights = twin.route_all(encoded, tasks)
    answers = twin.answer(encoded, tasks)
    batched = twin(**twin.collate(encoded), task=tasks).logits

    shared = load_file(twin_directory / "model" / "model.safetensors")
    factors = {task: load_file(twin_directory / "experts" / task / "adapter_model.safetensors") for task in TASKS}
    heads = {task: expert_alone(task, real_experts) for task in TASKS}
    expected: list[Tensor] = []
    for (text, task), row_weights in zip(texts, weights.double(), strict=True):
        model = copy.deepcopy(heads[task]).double()
        for name, parameter in model.bert.named_parameters():
            fused = shared[name].double()
            key = f"base_model.model.{name.removesuffix('.weight')}"
            for other, weight in zip(TASKS, row_weights, strict=True):
                if f"{key}.lora_A.weight" in factors[other]:
                    A, B = (factors[other][f"{key}.lora_{side}.weight"].double() for side in "AB")
                    fused = fused + weight * (B @ A)
            parameter.data.copy_(fused)
        inputs = twin.tokenizer(*[part for part in text if part is not None], return_tensors="pt")
        with torch.no_grad():
            expected.append(model(**inputs).logits[0])
    sharpest = weights.max(dim=1).values
    assert sharpest.min() < 0.98 < sharpest.max()  # soft and sharp rows both occur
    for row, reference in enumerate(expected):
        scale = 1e-5 * max(1.0, float(reference.norm()))
        assert (answers[row].logits.double() - reference).norm() <= scale
        assert (batched[row, : len(reference)].double() - reference).norm() <= scale


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_logits_stay_within_the_tolerance_on_every_task(
    twin_directory: Path, real_data: Path, tolerance: float
) -> None:
    """The bound measured at build time, on held-out training rows, holds on validation rows."""
    exact = TwinModel.from_pretrained(twin_directory)
    near = TwinModel.from_pretrained(twin_directory, tolerance=tolerance)
    assert near.sensitivity is not None
    assert 0.3 < near.sensitivity < 30
    for task in TASKS:
        encoded = exact.encode(rows_of(real_data, task, 40), max_length=128)
        tasks, weights = [task] * 40, exact.route_all(encoded)
        reference = torch.stack([row.logits for row in exact.answer(encoded, tasks, fusion_weights=weights)])
        found = torch.stack([row.logits for row in near.answer(encoded, tasks, fusion_weights=weights)])
        error = (found - reference).abs().amax(dim=1).square().mean().sqrt()
        assert error <= tolerance * reference.abs().amax(dim=1).square().mean().sqrt()
        assert (near.simplest(weights) == 0).sum() > (weights == 0).sum()


def test_experts_and_their_leaderboard_rows_are_transformers_own(
    real_data: Path, real_experts: Path, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        f"name: real\nbase_model: {BASE}\nexperts: {real_experts / 'minilm'}\ndata: {real_data}\n"
        "tasks: [cola, stsb, mnli]\nmethods: [pretrained, experts]\n"
    )
    assert leaderboard(["--suite", str(suite), "--out", str(tmp_path / "out"), "--limit", "60"]) == 0
    import json

    cells = {(r["method"], r["task"]): r for r in json.loads((tmp_path / "out" / "leaderboard.json").read_text())}
    tokenizer = AutoTokenizer.from_pretrained(model_directory(BASE))
    for task in TASKS:
        model, rows = expert_alone(task, real_experts), read_rows(split_path(real_data, task), GLUE[task])[:60]
        predictions = []
        for row in rows:
            parts = [part for part in GLUE[task].texts(row) if part is not None]
            with torch.no_grad():
                logits = model(**tokenizer(*parts, return_tensors="pt", truncation=True, max_length=128)).logits[0]
            predictions.append(float(logits[0]) if task == "stsb" else int(logits.argmax()))
        alone = score(GLUE[task].metric, [row["label"] for row in rows], predictions)
        assert cells["experts", task]["score"] == pytest.approx(alone, abs=1e-3)
        assert cells["experts", task]["n"] == 60


def test_log_likelihoods_through_lm_eval_at_full_rank_are_the_experts_own(
    real_data: Path, real_experts: Path, tmp_path: Path
) -> None:
    """Log-likelihoods, not accuracies: one expert at weight 1 and density 1 is that expert."""
    recipe = {
        "base_model": BASE,
        "experts": {"mnli": str(real_experts / "minilm" / "mnli")},
        "exclusive": {"density": 1.0},
    }
    build_twin(Recipe.model_validate(recipe), tmp_path / "twin")
    lm = ClassifierTwin(twin=TwinModel.from_pretrained(tmp_path / "twin", routing="task"))
    manager = TaskManager(
        include_path=str(tasks_directory()), include_defaults=False, metadata={"data": str(real_data)}
    )
    samples = lm_eval.simple_evaluate(lm, tasks=["twin_mnli"], task_manager=manager, limit=40)["samples"]["twin_mnli"]
    model, tokenizer = expert_alone("mnli", real_experts), AutoTokenizer.from_pretrained(model_directory(BASE))
    for sample in samples:
        inputs = tokenizer(sample["doc"]["text"], sample["doc"]["text_pair"], return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0].log_softmax(dim=0)
        found = torch.tensor([value for value, _ in sample["filtered_resps"]])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
