"""The engine: a harness's asks, translated to the scheduler's requests and back in order."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from twin_bench import InputError, TwinModel
from twin_bench.compat import SINCE_5
from twin_bench.config import parse
from twin_bench.errors import RefusedError
from twin_bench.serving.engine import Ask, Engine, engine
from twin_bench.serving.settings import TwinSettings

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
    """No harness says where in it the context ends. The first token has no probability, which counts as 0."""
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
def test_what_can_not_be_answered_does_not_disturb_the_rest(directory: Path, max_tokens: int) -> None:
    engine = Engine(TwinModel.from_pretrained(directory), 2)
    refused = {
        (): "an empty prompt: give it",
        (5,) * 66: "a prompt of 66 tokens",
        (5, 4000): "token 4000 in a prompt: the model's vocabulary has 300",
    }
    asked = [dataclasses.replace(GREEDY, prompt=prompt, max_tokens=max_tokens) for prompt in refused]
    found = engine.answer([asked[0], ASKED[0], *asked[1:], ASKED[1]])
    assert [found[1], found[4]] == engine.answer(ASKED[:2])
    for answer, says in zip((found[0], *found[2:4]), refused.values(), strict=True):
        assert isinstance(answer, RefusedError)
        assert says in str(answer)
    with pytest.raises(RefusedError, match="an empty prompt"):
        engine.ask(asked[0])


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize(("routing", "says"), [("router", "the features"), ("task", "logits in float32")])
def test_what_is_not_finite_is_refused_alone(directory: Path, max_tokens: int, routing: str, says: str) -> None:
    twin, token = TwinModel.from_pretrained(directory, routing=routing), 30
    prompts = [(5, 6, 7), (30, 20), (9, 8, 7, 6), (8, 250), (40, 41, 42), (11, 12), (30, 8, 7), (13, 30, 4)]
    asked = [dataclasses.replace(GREEDY, prompt=prompt, max_tokens=max_tokens) for prompt in prompts]
    fine = [token not in request.prompt for request in asked]
    expected = Engine(twin, 8, "mmlu").answer([request for request, good in zip(asked, fine, strict=True) if good])
    spoil = lambda module, inputs, out: out.masked_fill((inputs[0] == token)[..., None], torch.nan)  # noqa: E731
    twin.model.get_input_embeddings().register_forward_hook(spoil)
    done: list[int] = []
    engine = Engine(twin, 8, "mmlu")
    found = engine.answer(asked, done.append)
    assert [isinstance(answer, list) for answer in found] == fine
    assert sum(done) == 2 * sum(fine)
    for ours, theirs in zip((answer for answer in found if isinstance(answer, list)), expected, strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        assert ours[0].log_probs == pytest.approx(theirs[0].log_probs, abs=1e-5)
    for answer in found:
        if not isinstance(answer, list):
            assert isinstance(answer, RefusedError)
            assert str(answer).startswith(says)
            assert "row 0 not finite" in str(answer)
    with pytest.raises(RefusedError, match="row 0 not finite"):
        engine.ask(asked[fine.index(False)])


def test_equal_requests_are_answered_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = TwinModel.from_pretrained(directory)
    rows: list[int] = []
    batch = twin.generate_batch

    def counted(inputs: Any, *arguments: Any, **options: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return batch(inputs, *arguments, **options)

    monkeypatch.setattr(twin, "generate_batch", counted)
    other = dataclasses.replace(GREEDY, seed="t")
    found = Engine(twin, 8).answer([GREEDY, other, GREEDY, GREEDY])
    assert rows == [2]
    assert found == [found[0], found[1], found[0], found[0]]  # the other seed's is a row of its own: rounded otherwise
    assert [one.tokens for one in found[1]] == [one.tokens for one in found[0]]
    assert found[1][0].log_probs == pytest.approx(found[0][0].log_probs, abs=1e-5)


def test_a_batch_over_the_memory_is_halved(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of this test holds three rows. The answers stay what they are."""
    twin = TwinModel.from_pretrained(directory)
    asked = [
        dataclasses.replace(request, prompt=(*request.prompt, token))
        for token in range(5, 15)
        for request in (GREEDY, SCORED, dataclasses.replace(GREEDY, max_tokens=1))
    ]
    expected = Engine(twin, 16).answer(asked)
    room = 3
    rows: list[int] = []
    forward = twin.model.forward

    def limited(*arguments: Any, **inputs: Any) -> Any:
        count = len(arguments[0] if arguments else inputs["input_ids"])
        if count > room:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")
        rows.append(count)
        return forward(*arguments, **inputs)

    monkeypatch.setattr(twin.model, "forward", limited)
    engine, done = Engine(twin, 16), []
    found = engine.answer(asked, done.append)
    assert engine.batch_size == 2
    assert sum(done) == 2 * len(asked)  # each is routed, and answered
    assert max(rows) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    room = 0
    with pytest.raises(InputError, match=r"of cpu does not hold one row \(CUDA out of memory\.\); use a"):
        engine.answer(asked)


def test_a_scored_prompt_takes_its_share_of_the_time(directory: Path) -> None:
    engine = Engine(TwinModel.from_pretrained(directory), 4)
    begun = time.perf_counter()
    (short,), (long,) = engine.answer([SCORED, dataclasses.replace(SCORED, prompt=SCORED.prompt * 3)])
    assert 0 < 3 * short.seconds == pytest.approx(long.seconds)
    assert short.seconds + long.seconds <= time.perf_counter() - begun


@pytest.mark.skipif(not SINCE_5, reason="device maps need transformers 5")
def test_a_twin_on_several_devices_answers_as_on_one(directory: Path) -> None:
    settings = parse(TwinSettings, {"device_map": {"": "disk"}, "max_memory": {0: "1GiB", "cpu": 9}}, "-M")
    spread, alone = engine(str(directory), settings), Engine(TwinModel.from_pretrained(directory), 8)
    assert spread is engine(str(directory), settings)
    assert all(layer.weight.is_meta for layer in spread.twin.fusion.layers)
    for ours, theirs in zip(spread.answer(ASKED), alone.answer(ASKED), strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
