"""The engine: HELM's asks, translated to the scheduler's requests and back in order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from twin_bench import InputError, TwinModel
from twin_bench_helm.engine import Ask, Engine

pytestmark = pytest.mark.versions

GREEDY = Ask((5, 6, 7), max_tokens=3, temperature=0.0, top_p=1.0, completions=1, stop=(), seed="s")
SCORED = dataclasses.replace(GREEDY, prompt=(9, 8, 7, 6), max_tokens=0)
ASKED = [
    SCORED,
    GREEDY,
    dataclasses.replace(SCORED, prompt=(7,)),
    dataclasses.replace(GREEDY, temperature=3.0, completions=2),
    dataclasses.replace(GREEDY, prompt=(20, 30), max_tokens=1),
    dataclasses.replace(SCORED, prompt=(20, 30)),
]


@pytest.fixture
def directory(causal_twins: Any) -> Path:
    return causal_twins("llama")


def test_a_list_of_all_kinds_is_answered_in_order(directory: Path) -> None:
    engine = Engine(TwinModel.from_pretrained(directory), 4)
    found = engine.answer(ASKED)
    assert [len(completions) for completions in found] == [request.completions for request in ASKED]
    for request, completions in zip(ASKED, found, strict=True):
        (*expected,) = engine.ask(request)
        for ours, theirs in zip(completions, expected, strict=True):
            assert ours.tokens == theirs.tokens
            assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)
        if not request.max_tokens:
            assert completions[0].tokens == list(request.prompt)


def test_a_prompt_is_scored_under_the_weights_of_all_of_it(directory: Path) -> None:
    """HELM does not say where in it the context ends. The first token has no probability, which HELM writes as 0."""
    twin = TwinModel.from_pretrained(directory)
    for request in ASKED:
        if not request.max_tokens:
            ((completion,),) = Engine(twin, 1).answer([request])
            logits = twin(torch.tensor([request.prompt])).logits[0].log_softmax(dim=-1)
            after = [float(logits[place, token]) for place, token in enumerate(request.prompt[1:])]
            assert completion.log_probs == pytest.approx([0.0, *after], abs=1e-4)


def test_an_engine_told_the_task_tells_the_twin(directory: Path) -> None:
    told = TwinModel.from_pretrained(directory, routing="task")
    assert Engine(told, 2, "mmlu").answer(ASKED)[1] != Engine(told, 2, "bbq").answer(ASKED)[1]
    with pytest.raises(InputError, match="routing=task needs the rows' tasks"):
        Engine(told, 2).answer(ASKED)


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_an_empty_prompt_is_refused(directory: Path, max_tokens: int) -> None:
    with pytest.raises(InputError, match="an empty prompt: nothing to"):
        Engine(TwinModel.from_pretrained(directory), 2).answer(
            [dataclasses.replace(GREEDY, prompt=(), max_tokens=max_tokens)]
        )
