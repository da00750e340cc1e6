"""A router that is trained through the fused model: its gradient, and what the training does and leaves alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.families import built
from tests.support.models import WORDS
from twin_bench import InputError, TwinModel
from twin_bench.data.rows import read_router_rows
from twin_bench.data.task import TaskInput
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe
from twin_bench.twin.routers.base import Examples, RouterConfig
from twin_bench.twin.routers.registry import find_kind
from twin_bench.twin.routers.task_loss import Answered, losses, trained_on_task_loss

TASKS = ("cola", "stsb", "mnli")


@pytest.fixture
def setting(twins: Any) -> tuple[Any, Any, Answered]:
    """A twin, a linear router on its first layer, and rows that are to get the answers of each other's experts.

    The task-id router sends every row to its own expert, and the best answers are another's.
    """
    twin: Any = TwinModel.from_pretrained(twins("bert"))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(WORDS), (48, 6), generator=generator)
    encoded = twin.encode([(" ".join(WORDS[word] for word in row), None) for row in drawn])
    tasks = [TASKS[row % 3] for row in range(48)]
    (features,) = twin.features_of(encoded, [1], batch_size=16)
    owners = torch.arange(48) % 3
    wrong = F.one_hot((owners + 1) % 3, 3).float()
    answers = [
        float(found.logits) if len(found.logits) == 1 else int(found.logits.argmax())
        for found in twin.answer(encoded, tasks, fusion_weights=wrong)
    ]
    examples = Examples(features, owners, features, owners)
    router = find_kind("linear").fit(RouterConfig(TASKS, 24, 1, kind="linear"), examples, {"strength": 100.0})
    return twin, router, Answered(encoded, features, tasks, [[answer] for answer in answers])


def test_the_gradient_is_that_of_the_fused_models_loss(setting: Any) -> None:
    """Against central differences of logits that are computed without gradients, by another path."""
    twin, router, rows = setting
    router.requires_grad_(True)
    batch = [0, 1, 2, 3]
    found = losses(twin, router, rows, batch)
    (gradient,) = torch.autograd.grad(found.sum(), [router.linear.bias])
    router.requires_grad_(False)

    def total(shift: torch.Tensor) -> float:
        weights = torch.softmax(router(rows.features[batch]) + shift, dim=1)
        tasks = [rows.tasks[row] for row in batch]
        answers = twin.answer([rows.encoded[row] for row in batch], tasks, fusion_weights=weights)
        sums = 0.0
        for row, answer in zip(batch, answers, strict=True):
            (target,) = rows.answers[row]
            if len(answer.logits) == 1:
                sums += (float(answer.logits) - target) ** 2
            else:
                sums += F.cross_entropy(answer.logits.double(), torch.tensor(target)).item()
        return sums

    assert found.sum().item() == pytest.approx(total(torch.zeros(3)), rel=1e-4)
    step = 1e-2
    for expert in range(3):
        shift = step * torch.eye(3)[expert]
        expected = (total(shift) - total(-shift)) / (2 * step)
        assert gradient[expert].item() == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_rows_that_can_t_share_a_batch_run_one_by_one(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, router, rows = setting
    batch = [0, 1, 2, 3]
    together, per_row, counts = losses(twin, router, rows, batch), twin.fusion.per_row, []
    monkeypatch.setattr(twin.fusion, "mixes", False)
    monkeypatch.setattr(twin.fusion, "per_row", lambda weights: counts.append(len(weights)) or per_row(weights))
    torch.testing.assert_close(losses(twin, router, rows, batch), together)
    assert counts == [1, 1, 1, 1]


def test_a_text_with_several_labels_has_the_mean_of_their_losses(setting: Any, tmp_path: Path) -> None:
    twin, router, rows = setting
    first = {"cola": [0], "stsb": [1.5], "mnli": [2]}
    second = {"cola": [1], "stsb": [4.0], "mnli": [0]}
    both = {task: [*first[task], *second[task]] for task in TASKS}
    one, other, together = (
        losses(twin, router, replace(rows, answers=[given[task] for task in rows.tasks]), range(6))
        for given in (first, second, both)
    )
    torch.testing.assert_close(together, (one + other) / 2)
    assert (one - other).abs().min() > 0.01
    data = labelled_rows(tmp_path / "data")
    lines = (data / "cola" / "train.jsonl").read_text().splitlines()
    twice = {**json.loads(lines[0]), "label": 1 - json.loads(lines[0])["label"]}
    (data / "cola" / "train.jsonl").write_text("\n".join([*lines, json.dumps(twice)]))
    answers = read_router_rows(data, TASKS).answers()
    assert answers[TaskInput(twice["sentence"], None, "cola")] == [0, 1]
    assert sum(map(len, answers.values())) == 61


def test_training_lowers_the_loss_and_changes_the_router_alone(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, router, rows = setting
    monkeypatch.setattr("twin_bench.twin.routers.task_loss.LEARNING_RATE", 0.3)
    before = {name: tensor.clone() for name, tensor in {**twin.state_dict(), **router.state_dict()}.items()}
    state = torch.get_rng_state()
    trained = trained_on_task_loss(router, twin, rows, rows, epochs=6, seed=1)
    again = trained_on_task_loss(router, twin, rows, rows, epochs=6, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trained.linear.weight, again.linear.weight)
    told = trained.notes["task_loss"]
    assert told["after"] < 0.9 * told["before"]
    assert told["epoch"] > 0
    after = {**twin.state_dict(), **router.state_dict()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for model in (twin, trained) for parameter in model.parameters())


def test_an_epoch_that_makes_it_worse_is_not_taken(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, router, rows = setting
    monkeypatch.setattr("twin_bench.twin.routers.task_loss.LEARNING_RATE", 30.0)
    weights = torch.softmax(router(rows.features), dim=1)
    answers = [
        float(found.logits) if len(found.logits) == 1 else int(found.logits.argmax())
        for found in twin.answer(rows.encoded, rows.tasks, fusion_weights=weights)
    ]
    choosing = Answered(rows.encoded, rows.features, rows.tasks, [[answer] for answer in answers])
    trained = trained_on_task_loss(router, twin, rows, choosing, epochs=1)
    assert trained.notes["task_loss"]["epoch"] == 0
    assert torch.equal(trained.linear.weight, router.linear.weight)


def labelled_rows(folder: Path) -> Path:
    """Write 20 training rows a task, in the schemas of GLUE."""
    generator = torch.Generator().manual_seed(1)
    for task in TASKS:
        (folder / task).mkdir(parents=True)
        lines = []
        for row in range(20):
            text, other = (
                " ".join(WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=generator)) for _ in range(2)
            )
            lines.append(
                {
                    "cola": {"sentence": text, "label": row % 2},
                    "stsb": {"sentence1": text, "sentence2": other, "label": float(row % 5)},
                    "mnli": {"premise": text, "hypothesis": other, "label": row % 3},
                }[task]
            )
        (folder / task / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_a_recipe_asks_for_it(families: Any, tmp_path: Path) -> None:
    family = families("bert")
    router = {"data": str(labelled_rows(tmp_path / "data")), "kind": "linear", "objective": "task_loss", "layer": 1}
    directory = built({**family.recipe, "router": router}, tmp_path / "twin")
    told = json.loads((directory / "twin.json").read_text())["router"]
    assert told["objective"] == "task_loss"
    assert told["task_loss"]["after"] <= told["task_loss"]["before"]


@pytest.mark.parametrize(
    ("router", "says"),
    [
        ({}, "no labelled training row of expert 'cola'"),
        ({"kind": "knn"}, "kind knn has no parameters to train; give mlp or linear"),
    ],
)
def test_task_loss_that_can_t_be(
    families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router: dict[str, Any], says: str
) -> None:
    """It is refused before a merge is made."""
    monkeypatch.setattr("twin_bench.twin.shared.merge_lazily", None)
    family = families("bert")
    asked = {**family.recipe, "router": {**family.recipe["router"], "objective": "task_loss", **router}}
    with pytest.raises(InputError, match=says):
        build_twin(Recipe.model_validate(asked), tmp_path / "twin")


def test_a_language_model_has_no_such_loss(causal_families: Any, tmp_path: Path) -> None:
    family = causal_families("llama")
    asked = {**family.recipe, "router": {**family.recipe["router"], "objective": "task_loss"}}
    with pytest.raises(InputError, match="it is the loss of classifiers"):
        build_twin(Recipe.model_validate(asked), tmp_path / "twin")
