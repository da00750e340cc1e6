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
ONES = torch.ones_like(IDS)
EVEN = torch.full((3, 3), 1 / 3)
ROWS = [tokens([5, 6]), tokens([7]), tokens([5, 6])]
TASKS = ["cola", "mnli", "stsb"]
PLAUSIBLE: dict[str, list[Any]] = {
    "input_ids": [IDS, IDS.int(), IDS * 0, IDS + 1, IDS.T.contiguous().T],
    "attention_mask": [ONES, ONES.bool(), ONES.float(), torch.tensor([[0, 0, 1, 1, 1]] * 3), None],
    "token_type_ids": [IDS * 0, ONES, None],
    "fusion_weights": [EVEN, -EVEN, EVEN.double(), EVEN.half(), torch.eye(3), torch.eye(3).long(), EVEN * 0, None],
    "task": ["cola", TASKS, tuple(TASKS)],
    "tasks": [TASKS, tuple(TASKS)],
    "encoded": [ROWS, tuple(ROWS)],
    "texts": [[("the cat", None)] * 3, [("a", "b"), ("", ""), ("\U0001f600 a", None)]],
}
TENSORS = [
    *(IDS[:1], IDS[0], IDS[:, :0], IDS[:0], IDS.float(), IDS.bool(), IDS - 100, IDS + 10**6, IDS.to("meta")),
    *(EVEN[:2], EVEN.T[:, :2], EVEN * math.nan, EVEN / 0, EVEN * 1e38, EVEN + 1j, EVEN > 0, EVEN.to_sparse()),
    *(torch.tensor(3), torch.zeros(0), torch.ones(3, 5, 5), torch.ones(3, 100).long(), torch.full((3, 5), 0.5)),
]
LISTS = [
    *([("\ud83d", None)] * 3, [("x " * 500, None)] * 3, ["the"] * 3),
    *([tokens([])] * 3, [{"input_ids": [1]}] * 3, [tokens([10**9])] * 3, [tokens([4] * 99)] * 3, [{}] * 3),
    *("kola", ["cola"] * 2, ["mmlu"] * 3, ["cola", None, 3]),
]
VALUES = [*ODD, *TENSORS, *LISTS, *[value for values in PLAUSIBLE.values() for value in values], np.ones((3, 5))]
COUNTS = ("num_beams", "completions", "steps")
"""What takes as much memory or time as is asked for."""


@st.composite
def changed(draw: st.DrawFn, valid: dict[str, Any]) -> dict[str, Any]:
    """Return arguments that may be right, of which up to two are something else."""
    arguments = {name: draw(st.sampled_from(PLAUSIBLE.get(name, [value]))) for name, value in valid.items()}
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        name, value = draw(st.sampled_from(sorted(valid))), draw(st.sampled_from(VALUES))
        if not (name in COUNTS and isinstance(value, int) and value > 10):
            arguments[name] = value
    return arguments


@pytest.fixture(scope="module")
def classifier(twins: Any) -> Any:
    return TwinModel.from_pretrained(twins("bert"))


@pytest.fixture(scope="module")
def causal(causal_twins: Any) -> Any:
    return TwinModel.from_pretrained(causal_twins("llama"))


BATCH = {"input_ids": IDS, "attention_mask": ONES}
TYPED = {**BATCH, "token_type_ids": IDS * 0, "fusion_weights": EVEN, "task": "cola"}
ANSWER = {"encoded": ROWS, "tasks": TASKS, "batch_size": 2, "fusion_weights": EVEN}
CLASSIFY = {"texts": PLAUSIBLE["texts"][0], "tasks": TASKS, "max_length": 8}


@cases(400)
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


GENERATED = {**BATCH, "fusion_weights": EVEN, "max_new_tokens": 2, "num_beams": 1}


@cases(300)
@given(data=st.data(), name=st.sampled_from(["forward", "generate", "route", "encode"]))
def test_language_models(causal: Any, data: Any, name: str) -> None:
    forward = {**BATCH, "fusion_weights": EVEN}
    encode = {"texts": CLASSIFY["texts"], "max_length": 8}
    valid = {"forward": forward, "generate": GENERATED, "route": BATCH, "encode": encode}[name]
    arguments = data.draw(changed(valid))
    run: Callable[..., Any] = getattr(causal, name)
    ends_well(lambda: run(**arguments) if name == "encode" else finite(run(**arguments)), TypeError)


@cases(200)
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
    options = data.draw(changed({"batch_size": 2, "max_length": 32, "fusion_weights": EVEN}))
    asked = [Score([5], [6]), Score([5, 6], [7]), Score([5], [8, 9])]
    ends_well(lambda: score(causal, asked, **options), TypeError)


BASE, TUNED = models(experts=2)
SMALL = {name: BASE[name] for name in ("vector", "square")}
EXPERT = {name: TUNED["task0"][name] for name in SMALL}


@cases(400)
@given(data=st.data(), method=st.sampled_from(sorted(EXPERTS)))
def test_merges(data: Any, method: str) -> None:
    defaults = dict(methods()[method].defaults)
    options = data.draw(changed(defaults)) if defaults and data.draw(st.booleans()) else {}
    given: dict[str, Any] = {"base": SMALL, "experts": {"a": EXPERT, "b": EXPERT}}
    if not options:
        value, place = data.draw(st.sampled_from(VALUES)), data.draw(st.sampled_from(["base", "expert", "one", "all"]))
        if place == "base":
            given["base"] = {**SMALL, "square": value}
        elif place == "expert":
            given["experts"]["b"] = {**EXPERT, "square": value}
        elif place == "one":
            given["experts"]["b"] = value
        else:
            given[data.draw(st.sampled_from(sorted(given)))] = value
    ends_well(lambda: merge(method, **given, **options), TypeError)
    ends_well(lambda: dict(TaskVectors(**given).items()), TypeError)
