"""Arguments of the API that are right but for a few: an answer, an InputError, or a TypeError for what is no tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.merges import EXPERTS, models
from tests.support.mutations import ODD, cases, ends_well
from twin_bench import TaskVectors, TwinModel, merge, methods
from twin_bench.twin.causal import tokens
from twin_bench.twin.requests import Generate, Score, generate, score

IDS = torch.randint(4, 25, (3, 5), generator=torch.Generator().manual_seed(0))
EVEN = torch.full((3, 3), 1 / 3)
TENSORS = [
    *(IDS, IDS[:1], IDS[0], IDS[:, :0], IDS[:0], IDS.float(), IDS.int(), IDS.bool(), IDS - 100, IDS + 10**6, IDS * 0),
    *(
        EVEN,
        EVEN[:2],
        EVEN.T[:, :2],
        -EVEN,
        EVEN * 0,
        EVEN * math.nan,
        EVEN / 0,
        EVEN * 1e38,
        EVEN.double(),
        EVEN.half(),
    ),
    *(EVEN + 1j, torch.tensor(3), torch.zeros(0), torch.ones(3, 5, 5), torch.ones(3, 100).long(), IDS.repeat(40, 1)),
    *(torch.ones(3, 5), torch.full((3, 5), 0.5), torch.eye(3), torch.eye(3).long(), IDS.to("meta"), EVEN.to_sparse()),
]
TEXTS = [[("the cat", None)] * 3, [("a", "b"), ("", ""), ("\ud83d", None)], [("x " * 500, None)] * 3, ["the"] * 3, []]
LISTS = [
    [tokens([5, 6])] * 3,
    [tokens([])] * 3,
    [{"input_ids": [1]}] * 3,
    [tokens([10**9])] * 3,
    [tokens([4] * 99)] * 3,
]
NAMES = ["cola", ["cola", "mnli", "stsb"], ["cola"] * 2, "kola", ["mmlu"] * 3, "mmlu"]
VALUES = [*ODD, *TENSORS, *TEXTS, *LISTS, *NAMES, np.ones((3, 5), dtype=int)]


COUNTS = ("num_beams", "completions", "steps")
"""What takes as much memory or time as is asked for."""


def too_many(value: Any) -> bool:
    return isinstance(value, int) and value > 10


def changed(valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return valid arguments of which one or two are something else."""
    wrong = st.dictionaries(st.sampled_from(sorted(valid)), st.sampled_from(VALUES), min_size=1, max_size=2)
    return wrong.map(lambda given: {**valid, **given}).filter(
        lambda given: not any(too_many(given.get(name)) for name in COUNTS)
    )


@pytest.fixture(scope="module")
def classifier(twins: Any) -> Any:
    return TwinModel.from_pretrained(twins("bert"))


@pytest.fixture(scope="module")
def causal(causal_twins: Any) -> Any:
    return TwinModel.from_pretrained(causal_twins("llama"))


BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TYPED = {**BATCH, "token_type_ids": IDS * 0, "fusion_weights": EVEN, "task": "cola"}
ANSWER = {"encoded": LISTS[0], "tasks": NAMES[1], "batch_size": 2, "fusion_weights": EVEN}
CLASSIFY = {"texts": TEXTS[0], "tasks": NAMES[1], "max_length": 8}


@cases(250)
@given(data=st.data(), name=st.sampled_from(["forward", "answer", "classify", "route"]))
def test_classifiers(classifier: Any, data: Any, name: str) -> None:
    valid = {"forward": TYPED, "answer": ANSWER, "classify": CLASSIFY, "route": BATCH}[name]
    arguments = data.draw(changed(valid))
    ends_well(lambda: finite(getattr(classifier, name)(**arguments)), TypeError)


def finite(answer: Any) -> None:
    """Check that an answer holds numbers alone; a classifier's rows of fewer labels are filled with -inf."""
    if isinstance(answer, list):
        for one in answer:
            assert torch.isfinite(one.logits).all()
        return
    logits = getattr(answer, "logits", answer)
    assert not torch.isnan(logits).any()
    assert not torch.isposinf(logits).any()


GENERATED = {**BATCH, "fusion_weights": EVEN, "max_new_tokens": 2, "do_sample": False, "num_beams": 1}


@cases(200)
@given(data=st.data(), name=st.sampled_from(["forward", "generate", "route", "encode"]))
def test_language_models(causal: Any, data: Any, name: str) -> None:
    forward = {**BATCH, "fusion_weights": EVEN, "task": None}
    encode = {"texts": TEXTS[0], "max_length": 8}
    valid = {"forward": forward, "generate": GENERATED, "route": BATCH, "encode": encode}[name]
    arguments = data.draw(changed(valid))
    run: Callable[..., Any] = getattr(causal, name)
    ends_well(lambda: run(**arguments) if name == "encode" else finite(run(**arguments)), TypeError)


@cases(150)
@given(data=st.data())
def test_requests(causal: Any, data: Any) -> None:
    if data.draw(st.booleans()):
        fields = data.draw(changed({"context": [5, 6], "continuation": [7, 8], "routed_on": [5]}))
        ends_well(lambda: score(causal, [Score([5], [6]), Score(**fields)]), TypeError)
    else:
        fields = data.draw(changed({"prompt": [5, 6], "max_new_tokens": 2, "completions": 1, "seed": "a"}))
        ends_well(lambda: generate(causal, [Generate([5], 1), Generate(**fields)]), TypeError)


@cases(150)
@given(data=st.data())
def test_lists_of_requests(causal: Any, data: Any) -> None:
    options = data.draw(changed({"batch_size": 2, "max_length": 32, "fusion_weights": EVEN[:2]}))
    asked = [Score([5], [6]), Score([5, 6], [7])]
    ends_well(lambda: score(causal, asked, **options), TypeError)


BASE, TUNED = models(experts=2)
SMALL = {name: BASE[name] for name in ("vector", "square")}
EXPERT = {name: TUNED["task0"][name] for name in SMALL}


@cases(300)
@given(data=st.data(), method=st.sampled_from(sorted(EXPERTS)))
def test_merges(data: Any, method: str) -> None:
    defaults = dict(methods()[method].defaults)
    options = data.draw(changed(defaults)) if defaults and data.draw(st.booleans()) else {}
    holder: dict[str, Any] = {"base": SMALL, "experts": {"a": EXPERT, "b": EXPERT}}
    if not options:
        holder = data.draw(
            st.sampled_from(
                [{"base": {**SMALL, "square": value}, "experts": holder["experts"]} for value in VALUES]
                + [{"base": SMALL, "experts": {"a": EXPERT, "b": {**EXPERT, "square": value}}} for value in VALUES]
                + [{**holder, name: value} for value in VALUES for name in holder]
            )
        )
    ends_well(lambda: merge(method, **holder, **options), TypeError)
    ends_well(lambda: dict(TaskVectors(**holder).items()), TypeError)
