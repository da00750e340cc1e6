"""DaWin against a dense loop over samples and experts, each model built for its sample, in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support.dense import interpolated_logits
from tests.support.models import WORDS, tiny_classifier, tiny_tokenizer
from twin_bench import InputError
from twin_bench.adaptive.dawin import DawinClassifier, confidence_weights
from twin_bench.adaptive.vectors import whole_task_vector
from twin_bench.checkpoints.sources import Sources, load_model, open_sources
from twin_bench.twin.parts import Parts

LABELS = {"cola": 2, "stsb": 1, "mnli": 3}
TEXTS = [
    (" ".join(WORDS[(3 * row + 5 * word) % len(WORDS)] for word in range(2 + row % 6)), None if row % 2 else "a cat")
    for row in range(9)
]


def dawin(sources: Sources, scaling: float = 1.0) -> DawinClassifier:
    base = dict(sources.base.items())
    parts = Parts(
        heads={task: expert.head() for task, expert in sources.experts.items()},
        exclusive={task: whole_task_vector(expert, base, sources.skeleton) for task, expert in sources.experts.items()},
    )
    return DawinClassifier(load_model(sources, base), sources.tokenizer, parts, scaling=scaling)


@pytest.fixture(scope="module", params=["bert", "gpt2", "bert-lora", "gpt2-lora"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a base model, its experts as transformers (and PEFT) alone make them, and the same opened from disk."""
    kind, _, lora = request.param.partition("-")
    root: Path = tmp_path_factory.mktemp(request.param)
    base = tiny_classifier(kind)
    base.save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    save = {"": full_expert, "lora": lora_expert}[lora]
    experts = {task: save(kind, base, root / task, labels, seed) for seed, (task, labels) in enumerate(LABELS.items())}
    return base, experts, open_sources(str(root / "base"), {task: str(root / task) for task in LABELS})


def full_expert(kind: str, base: Any, folder: Path, labels: int, seed: int) -> Any:
    expert = tiny_classifier(kind, labels, seed + 1, like=base, noise=0.3)
    expert.save_pretrained(folder)
    return expert


def lora_expert(kind: str, base: Any, folder: Path, labels: int, seed: int) -> Any:
    """An adapter on attention, MLP and the embeddings, and a head of its own."""
    model = tiny_classifier(kind, labels, seed + 1, like=base, noise=0.0)
    targets, head = {
        "bert": (["query", "output.dense", "word_embeddings"], ["classifier"]),
        "gpt2": (["c_attn", "c_fc", "wte"], ["score"]),
    }[kind]
    config = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=7, target_modules=targets, modules_to_save=head)
    adapted: PeftModel = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter += ("lora" in name) * 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return adapted.merge_and_unload().eval()


@pytest.mark.parametrize("scaling", [1.0, 0.9])
def test_answers_are_those_of_a_dense_loop_over_samples_and_experts(opened: Any, scaling: float) -> None:
    base, experts, sources = opened
    twin = dawin(sources, scaling)
    tasks = [list(LABELS)[row % 3] for row in range(len(TEXTS))]
    answers = twin.classify(TEXTS, tasks, batch_size=4)
    for text, task, answer in zip(TEXTS, tasks, answers, strict=True):
        inputs = twin.collate(twin.encode([text]))
        expected = interpolated_logits(base, experts, task, inputs, scaling)
        torch.testing.assert_close(answer.logits.double(), expected, rtol=1e-4, atol=1e-5)
        forwarded = twin(**inputs, task=task).logits[0]
        torch.testing.assert_close(forwarded.double(), expected, rtol=1e-4, atol=1e-5)


def test_weights_differ_by_row_and_are_equal_for_a_regression(opened: Any) -> None:
    twin = dawin(opened[2])
    weights = {task: twin.route_all(twin.encode(TEXTS), [task] * len(TEXTS)) for task in LABELS}
    for own in weights.values():
        torch.testing.assert_close(own.sum(dim=1), torch.ones(len(TEXTS)))
    assert torch.equal(weights["stsb"], torch.full((len(TEXTS), 3), 1 / 3))
    assert weights["cola"].std(dim=0).max() > 1e-3
    assert (weights["cola"] - weights["mnli"]).abs().max() > 1e-3


def test_a_rows_answer_does_not_depend_on_its_neighbours(opened: Any) -> None:
    twin = dawin(opened[2])
    tasks = [list(LABELS)[row % 3] for row in range(len(TEXTS))]
    together = twin.classify(TEXTS, tasks, batch_size=5)
    for text, task, answer in zip(TEXTS, tasks, together, strict=True):
        (alone,) = twin.classify([text], [task])
        torch.testing.assert_close(alone.logits, answer.logits, rtol=1e-5, atol=1e-6)
    backwards = twin.classify(TEXTS[::-1], tasks[::-1], batch_size=2)[::-1]
    for one, other in zip(together, backwards, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-6)


def test_one_hot_weights_are_the_experts(opened: Any) -> None:
    _, experts, sources = opened
    twin = dawin(sources)
    inputs = twin.collate(twin.encode(TEXTS))
    for index, (task, expert) in enumerate(experts.items()):
        with torch.no_grad():
            expected = expert(**inputs).logits
        found = twin(**inputs, fusion_weights=torch.eye(3)[index].repeat(len(TEXTS), 1), task=task).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_lora_experts_stay_low_rank(opened: Any) -> None:
    sources = opened[2]
    for expert in sources.experts.values():
        vector = whole_task_vector(expert, sources.base, sources.skeleton)
        for name in expert.low_rank:
            assert vector.factors[name].A.shape[0] == 3
        assert expert.low_rank.keys() <= vector.factors.keys()


def test_confidence_weights_written_out() -> None:
    logits = 3 * torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = confidence_weights(logits, 1.2)
    for row in range(5):
        likelihoods = [math.exp(sum(p * math.log(p) for p in logits[t, row].softmax(0).tolist())) for t in range(4)]
        expected = [1.2 * value / sum(likelihoods) for value in likelihoods]
        torch.testing.assert_close(weights[row], torch.tensor(expected, dtype=torch.float64))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(confidence_weights(logits[order], 1.2), weights[:, order])


def test_rows_without_a_task_are_refused(opened: Any) -> None:
    twin = dawin(opened[2])
    assert twin.classify([], []) == []
    with pytest.raises(InputError, match="name the rows' tasks"):
        twin.route_all(twin.encode(TEXTS))
    with pytest.raises(InputError, match="name it with task="):
        twin(**twin.collate(twin.encode(TEXTS)))
