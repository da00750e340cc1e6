"""What a caller gives a twin: an error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.models import CAUSAL_VOCABULARY, SPECIAL, WORDS
from twin_bench import InputError, TaskVectors, TwinModel, merge
from twin_bench.twin.causal import tokens
from twin_bench.twin.requests import Generate, Score, generate, score

IDS = torch.randint(4, 25, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
EVEN = torch.full((2, 3), 1 / 3)
CLASSIFIER_VOCABULARY = len(SPECIAL) + len(WORDS)


def with_value(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed[1, 2] = value
    return changed


BATCHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_ids": None}, TypeError, r"input_ids must be a tensor \(batch, length\), not NoneType None"),
    ({"input_ids": [[1, 2]]}, TypeError, r"input_ids must be a tensor \(batch, length\), not list \[\[1, 2\]\]"),
    ({"input_ids": np.ones((1, 2))}, TypeError, "input_ids must be a tensor"),
    ({"input_ids": IDS.float()}, InputError, "input_ids has the dtype float32, not int64"),
    ({"input_ids": IDS[0]}, InputError, r"input_ids has the shape \(6,\), not \(batch, length\)"),
    ({"input_ids": IDS[None]}, InputError, r"input_ids has the shape \(1, 2, 6\), not \(batch, length\)"),
    ({"input_ids": IDS[:0]}, InputError, "input_ids is an empty batch"),
    ({"input_ids": IDS[:, :0]}, InputError, "an empty context: give it one token at least"),
    ({"input_ids": IDS.repeat(1, 100)}, InputError, "an input of 600 tokens; the model's window is "),
    ({"input_ids": with_value(IDS, -1)}, InputError, "token -1 in a context: the model's vocabulary has"),
    ({"input_ids": with_value(IDS, 10**9)}, InputError, "token 1000000000 in a context: the model's vocabulary has"),
    ({"input_ids": IDS.to("meta")}, InputError, "input_ids is on meta, and the twin on cpu"),
    ({"attention_mask": MASK.tolist()}, TypeError, "attention_mask must be a tensor"),
    ({"attention_mask": MASK[:1]}, InputError, r"shape \(1, 6\), not that of input_ids, \(2, 6\)"),
    ({"attention_mask": MASK[:, None, None]}, InputError, r"attention_mask has the shape \(2, 1, 1, 6\)"),
    ({"attention_mask": with_value(MASK, 2)}, InputError, "attention_mask has 1 to 2; it is 1 on tokens and 0 on"),
    ({"attention_mask": with_value(MASK, -1)}, InputError, "attention_mask has -1 to 1; it is 1"),
    ({"attention_mask": with_value(MASK.float(), 0.5)}, InputError, "attention_mask has 0.5 to 1; it is 1"),
    ({"attention_mask": with_value(MASK.float(), torch.nan)}, InputError, "attention_mask has nan to nan; it is 1"),
    ({"attention_mask": MASK * torch.tensor([[1], [0]])}, InputError, "attention_mask is 0 on a whole row"),
    ({"fusion_weights": EVEN.tolist()}, TypeError, r"fusion_weights must be a tensor \(rows, experts\), not list"),
    ({"fusion_weights": EVEN[:1]}, InputError, r"fusion_weights is \(1, 3\), not \(rows, experts\) = \(2, 3\)"),
    ({"fusion_weights": EVEN.T}, InputError, r"fusion_weights is \(3, 2\), not \(rows, experts\) = \(2, 3\)"),
    ({"fusion_weights": EVEN > 0}, InputError, "fusion_weights has the dtype bool"),
    ({"fusion_weights": EVEN + 1j}, InputError, "fusion_weights has the dtype complex64"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "says"), BATCHES)
def test_batches_that_can_not_be_run(
    twins: Any, causal_twins: Any, given: dict[str, Any], kind: type[Exception], says: str
) -> None:
    classifier, causal = TwinModel.from_pretrained(twins("bert")), TwinModel.from_pretrained(causal_twins("llama"))
    runs: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (classifier, {"task": "cola"}),
        (causal, {}),
        (causal.generate, {"max_new_tokens": 1}),
    ]
    if "fusion_weights" not in given:
        runs += [(classifier.route, {}), (causal.route, {})]
    for run, options in runs:
        with pytest.raises(kind, match=says):
            run(**{"input_ids": IDS, **options, **given})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.uint8, torch.bfloat16])
def test_a_mask_may_have_any_dtype(twins: Any, causal_twins: Any, dtype: torch.dtype) -> None:
    mask = with_value(MASK, 1)
    mask[1, :2] = 0
    for twin, options in (
        (TwinModel.from_pretrained(twins("bert")), {"task": "cola"}),
        (TwinModel.from_pretrained(causal_twins("llama")), {}),
    ):
        expected = twin(IDS, mask, fusion_weights=EVEN, **options).logits[:, -1]
        found = twin(IDS, mask.to(dtype), fusion_weights=EVEN, **options).logits[:, -1]
        torch.testing.assert_close(found, expected)


def test_token_types(twins: Any) -> None:
    twin = TwinModel.from_pretrained(twins("bert"))
    with pytest.raises(InputError, match="token_type_ids holds 2; the model has 2 types, numbered from 0"):
        twin(IDS, token_type_ids=with_value(MASK, 2), task="cola")
    with pytest.raises(InputError, match=r"token_type_ids has the shape \(1, 6\)"):
        twin(IDS, token_type_ids=MASK[:1], task="cola")


@pytest.mark.parametrize(
    ("task", "kind", "says"),
    [
        (None, InputError, "takes the head from the task: name it with task="),
        ("kola", InputError, "the twin has no expert of task 'kola'; did you mean 'cola'?"),
        (["cola"], InputError, "1 tasks for 2 rows; give one task, or one a row"),
        (["cola", 3], InputError, "the twin has no expert of task 3; known: "),
        (["cola", ["mnli"]], InputError, r"the twin has no expert of task \['mnli'\]"),
        (3, TypeError, "task must be a name or a list of names, not int 3"),
    ],
)
def test_tasks(twins: Any, causal_twins: Any, task: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        TwinModel.from_pretrained(twins("bert"))(IDS, task=task)
    if task is not None:
        told = TwinModel.from_pretrained(causal_twins("llama"), routing="task")
        task = ["mmlu" if name == "cola" else name for name in task] if isinstance(task, list) else task
        with pytest.raises(kind, match=says.replace("did you mean 'cola'?", "").replace("mnli", "mnli")):
            told(IDS, task=task)


@pytest.mark.parametrize(
    ("encoded", "tasks", "options", "kind", "says"),
    [
        (None, [], {}, TypeError, "encoded must be a list of rows, not NoneType None"),
        ([[5]], ["cola"], {}, TypeError, r"encoded: row 0 must be a mapping with input_ids, not \[5\]"),
        ([tokens([5]), tokens([])], ["cola"] * 2, {}, InputError, r"an empty context \(row 1\)"),
        ([tokens([5, 6.0])], ["cola"], {}, InputError, r"6.0 in a context \(row 0\): a token's id is a whole number"),
        ([tokens([True])], ["cola"], {}, InputError, "True in a context"),
        ([tokens([CLASSIFIER_VOCABULARY])], ["cola"], {}, InputError, "the model's vocabulary has 28 tokens"),
        ([tokens([-1])], ["cola"], {}, InputError, "token -1"),
        ([tokens([5] * 99)], ["cola"], {}, InputError, "an input of 99 tokens in row 0; the model's window is 70"),
        ([{"input_ids": [5, 6], "attention_mask": [1]}], ["cola"], {}, InputError, "attention_mask of row 0 is not as"),
        ([{"input_ids": 5}], ["cola"], {}, TypeError, r"a context \(row 0\) must be a list of token ids, not int 5"),
        ([tokens([5])], ["cola"] * 2, {}, InputError, "2 tasks for 1 rows"),
        ([tokens([5])], None, {}, InputError, "the twin has no expert of task None"),
        ([tokens([5])], ["cola"], {"batch_size": 0}, InputError, "batch_size must be a whole number, 1 or more, not 0"),
        ([tokens([5])], ["cola"], {"batch_size": 1.5}, InputError, "batch_size must be a whole number"),
        ([tokens([5])], ["cola"], {"fusion_weights": EVEN}, InputError, r"\(rows, experts\) = \(1, 3\)"),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_answered(
    twins: Any, encoded: Any, tasks: Any, options: Any, kind: type[Exception], says: str
) -> None:
    twin: Any = TwinModel.from_pretrained(twins("bert"))
    with pytest.raises(kind, match=says):
        twin.answer(encoded, tasks, **options)
    assert twin.answer([], []) == []


@pytest.mark.parametrize(
    ("texts", "options", "kind", "says"),
    [
        ("the cat", {}, TypeError, "texts must be a list of"),
        (["ab"], {}, TypeError, "texts: row 0 must be "),
        ([("the cat", 3)], {}, TypeError, r"texts: row 0 must be \(text, text or None\), not \('the cat', 3\)"),
        ([(None, None)], {}, TypeError, "texts: row 0 must be"),
        ([("half \ud83d", None)], {}, InputError, "texts: row 0 holds half a surrogate pair"),
        ([("the cat", None)], {"max_length": 0}, InputError, "max_length must be a whole number, 1 or more, not 0"),
        ([("the cat", None)], {"max_length": 2.5}, InputError, "max_length must be a whole number"),
    ],
)
def test_texts_that_can_not_be_encoded(
    twins: Any, causal_twins: Any, texts: Any, options: Any, kind: type[Exception], says: str
) -> None:
    for directory in (twins("bert"), causal_twins("llama")):
        with pytest.raises(kind, match=says):
            TwinModel.from_pretrained(directory).encode(texts, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 10**9}, "prompts of 6 tokens and 1000000000 to generate; the model's window is 64"),
        ({"max_new_tokens": 59}, "prompts of 6 tokens and 59 to generate; the model's window is 64"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, 1 or more, not 0"),
        ({"max_new_tokens": -3}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"max_length": 6}, "max_length 6: the prompts have 6 tokens"),
        ({"max_length": 10**9}, "prompts of 6 tokens and 999999994 to generate"),
        ({"max_new_tokens": 2, "num_beams": 0}, "num_beams must be a whole number"),
        ({"max_new_tokens": 2, "num_return_sequences": "2"}, "num_return_sequences must be a whole number"),
        ({"max_new_tokens": 2, "num_return_sequences": 2}, "generate: "),
        ({"max_new_tokens": 2, "do_sample": True, "temperature": -1.0}, "generate: "),
        ({"max_new_tokens": 2, "no_such_option": 3}, "generate: "),
    ],
)
def test_options_that_can_not_be_generated_with(causal_twins: Any, options: dict[str, Any], says: str) -> None:
    twin: Any = TwinModel.from_pretrained(causal_twins("llama"))
    with pytest.raises(InputError, match=says):
        twin.generate(IDS, fusion_weights=EVEN, **options)


def test_as_many_tokens_as_the_window_holds(causal_twins: Any) -> None:
    twin: Any = TwinModel.from_pretrained(causal_twins("llama"))
    options = {"fusion_weights": EVEN, "eos_token_id": -1}
    assert twin.generate(IDS, max_new_tokens=58, **options).shape == (2, 64)
    assert twin.generate(IDS, max_length=10, **options).shape == (2, 10)
    assert twin.generate(IDS, max_new_tokens=None, **options).shape == (2, 26)
    with pytest.raises(InputError, match="prompts of 60 tokens and 20 to generate"):
        twin.generate(IDS.repeat(1, 10), fusion_weights=EVEN)


@pytest.mark.parametrize(
    ("request_", "kind", "says"),
    [
        (Score([5], []), InputError, "an empty continuation"),
        (Score([], [5]), InputError, "an empty context"),
        (Score([5], [6.0]), InputError, "6.0 in a continuation: a token's id is a whole number"),  # type: ignore[list-item]
        (Score(None, [6]), TypeError, "a context must be a list of token ids, not NoneType None"),  # type: ignore[arg-type]
        (Score("the", [6]), TypeError, "a context must be a list of token ids, not str 'the'"),  # type: ignore[arg-type]
        (Score([5], [CAUSAL_VOCABULARY]), InputError, "token 300 in a continuation: the model's vocabulary has 300"),
        (Score([10**5000], [6]), InputError, "<an integer of 16610 bits> in a context"),
    ],
    ids=range(7),
)
def test_requests_that_can_not_be_scored(causal_twins: Any, request_: Score, kind: type[Exception], says: str) -> None:
    twin: Any = TwinModel.from_pretrained(causal_twins("llama"))
    with pytest.raises(kind, match=says):
        score(twin, [Score([5], [6]), request_])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more, not 0"),
        ({"max_length": 0}, "max_length must be a whole number, 1 or more, not 0"),
        ({"max_length": 65}, "max_length 65: the model's window is 64"),
        ({"fusion_weights": EVEN}, r"fusion_weights is \(2, 3\), not \(rows, experts\) = \(1, 3\)"),
    ],
)
def test_how_requests_can_not_be_run(causal_twins: Any, options: dict[str, Any], says: str) -> None:
    twin: Any = TwinModel.from_pretrained(causal_twins("llama"))
    with pytest.raises(InputError, match=says):
        score(twin, [Score([5], [6])], **options)
    with pytest.raises(InputError, match=says):
        generate(twin, [Generate([5], 2)], **options)
    with pytest.raises(TypeError, match="requests must be a list, not NoneType None"):
        score(twin, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "experts", "kind", "says"),
    [
        (None, {"a": {}}, TypeError, "base must be a mapping of names to tensors, not NoneType None"),
        ([1], {"a": {}}, TypeError, r"base must be a mapping of names to tensors, not list \[1\]"),
        ({}, {"a": {}}, InputError, "base has no tensor"),
        ({"w": EVEN}, None, TypeError, "experts must be a mapping of names to models, not NoneType None"),
        ({"w": EVEN}, {}, InputError, "there is no expert to merge"),
        ({"w": EVEN}, {"a": None}, TypeError, "expert 'a' must be a mapping of names to tensors, not NoneType None"),
        ({"w": EVEN}, {3: {"w": EVEN}}, TypeError, "experts: a name must be a text, not int 3"),
        ({"w": EVEN}, {"a": {"w": EVEN.tolist()}}, TypeError, "expert 'a': w must be a tensor, not list"),
        ({"w": [1.0]}, {"a": {"w": EVEN}}, TypeError, "base: w must be a tensor, not list"),
        ({"w": EVEN.to("meta")}, {"a": {"w": EVEN}}, TypeError, "base: w must be a dense tensor that holds values"),
        ({"w": EVEN}, {"a": {"w": EVEN.to_sparse()}}, TypeError, "expert 'a': w must be a dense tensor"),
        ({"w": EVEN}, {"a": {"v": EVEN}}, InputError, "expert 'a' has no tensor w"),
        ({"w": EVEN}, {"a": {"w": EVEN.T}}, InputError, r"expert 'a': tensor w is \(3, 2\)"),
        ({"w": EVEN}, {"a": {"w": EVEN + 1j}}, InputError, "expert 'a': tensor w is complex64"),
        ({"w": EVEN / 0}, {"a": {"w": EVEN}}, InputError, "tensor w holds NaN or inf"),
    ],
)
def test_models_that_can_not_be_merged(base: Any, experts: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        merge("task_arithmetic", base, experts)
    with pytest.raises(kind, match=says):
        TaskVectors(base, experts)["w"]


def test_options_of_a_merge() -> None:
    models: Any = {"base": {"w": EVEN}, "experts": {"a": {"w": EVEN}}}
    for options, says in (
        ({"scaling": float("nan")}, "scaling must be a number, not nan"),
        ({"scaling": None}, "scaling must be a number, not None"),
        ({"scaling": EVEN}, "scaling must be a number, not tensor"),
        ({"scalng": 1}, "task_arithmetic has no option 'scalng'; did you mean 'scaling'?"),
    ):
        with pytest.raises(InputError, match=says):
            merge("task_arithmetic", **models, **options)
    with pytest.raises(InputError, match="unknown merge method 3"):
        merge(3, **models)  # type: ignore[arg-type]
