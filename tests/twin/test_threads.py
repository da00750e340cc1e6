"""A twin that several threads ask at once answers each as if it were asked alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twin_bench import TwinModel
from twin_bench.twin.builder import build_twin
from twin_bench.twin.recipe import Recipe

THREADS, ASKED = 8, 96


def asked_at_once(questions: list[Callable[[], Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the answers to questions that are asked one after the other, and those of many threads."""
    alone = [question() for question in questions]
    order = random.Random(0).sample(range(len(questions)), len(questions))
    with ThreadPoolExecutor(THREADS) as threads:
        together = dict(zip(order, threads.map(lambda place: questions[place](), order), strict=True))
    return alone, [together[place] for place in range(len(questions))]


@pytest.fixture(scope="module")
def classifier(families: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("threads") / "twin"
    build_twin(Recipe.model_validate(families("bert").recipe), directory)
    return TwinModel.from_pretrained(directory)


def test_a_classifier_is_asked_by_eight_threads(classifier: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    questions: list[Callable[[], Tensor]] = []
    for number in range(ASKED):
        ids = torch.randint(4, 26, (1 + number % 3, 3 + number % 5), generator=generator)
        weights = torch.rand(len(ids), 3, generator=generator)
        task = classifier.expert_names[number % 3]
        asks: list[Callable[[], Tensor]] = [
            lambda ids=ids: classifier.route(ids),
            lambda ids=ids, task=task: classifier(ids, task=task).logits,
            lambda ids=ids, weights=weights, task=task: classifier(ids, fusion_weights=weights, task=task).logits,
            lambda ids=ids, task=task: (
                classifier(ids, fusion_weights=torch.eye(3)[:1].repeat(len(ids), 1), task=task).logits
            ),
        ]
        questions.append(asks[number % len(asks)])
    for expected, found in zip(*asked_at_once(questions), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_language_model_is_asked_by_eight_threads(causal_families: Any, tmp_path: Path) -> None:
    build_twin(Recipe.model_validate(causal_families("llama").recipe), tmp_path / "twin")
    twin: Any = TwinModel.from_pretrained(tmp_path / "twin")
    generator = torch.Generator().manual_seed(0)
    questions: list[Callable[[], Tensor]] = []
    for number in range(ASKED // 2):
        ids = torch.randint(4, 300, (1 + number % 2, 4 + number % 3), generator=generator)
        weights = torch.rand(len(ids), 3, generator=generator)
        asks: list[Callable[[], Tensor]] = [
            lambda ids=ids: twin.route(ids),
            lambda ids=ids, weights=weights: twin(ids, fusion_weights=weights).logits,
            lambda ids=ids: twin(ids).logits,
            lambda ids=ids, weights=weights: twin.generate(
                ids, torch.ones_like(ids), fusion_weights=weights, max_new_tokens=4, do_sample=False
            ),
        ]
        questions.append(asks[number % len(asks)])
    for expected, found in zip(*asked_at_once(questions), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_copy_has_a_lock_of_its_own(classifier: Any) -> None:
    copied = copy.deepcopy(classifier)
    ids = torch.tensor([[5, 6, 7]])
    with classifier.fusion.shared(), ThreadPoolExecutor(1) as thread:
        found = thread.submit(lambda: copied(ids, task="cola").logits).result(timeout=30)
    torch.testing.assert_close(found, classifier(ids, task="cola").logits)
