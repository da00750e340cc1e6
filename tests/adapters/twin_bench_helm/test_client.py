"""HELM's client of a twin: against HELM's own HuggingFaceClient, dense models, and itself in other batches."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helm.clients.huggingface_client import HuggingFaceClient
from helm.common.cache import BlackHoleCacheConfig, SqliteCacheConfig
from helm.common.request import ErrorFlags, Request
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

from tests.support.dense import dense
from tests.support.models import WORDS
from twin_bench import InputError, TwinModel
from twin_bench.serving.engine import Engine
from twin_bench.twin.builder import build_twin
from twin_bench.twin.device import usable_device
from twin_bench.twin.recipe import Recipe
from twin_bench_helm.client import TwinClient

pytestmark = pytest.mark.versions


def client(twin: Path, cache: Any = None, **options: Any) -> TwinClient:
    return TwinClient(cache or BlackHoleCacheConfig(), str(twin), device="cpu", **options)


def asks(count: int = 9, **changes: Any) -> list[Request]:
    draw = random.Random(0)
    request = Request(model="twin_merged/tiny", model_deployment="twin_merged/tiny", temperature=0.0, max_tokens=6)
    request = dataclasses.replace(request, **changes)
    return [
        dataclasses.replace(request, prompt=" ".join(draw.choices(WORDS, k=draw.randint(2, 9)))) for _ in range(count)
    ]


Told = list[tuple[str, list[str], list[float]]]


def told(result: Any) -> Told:
    """Return each completion's text, tokens and their log-probabilities."""
    assert result.success, result.error
    return [
        (out.text, [token.text for token in out.tokens], [token.logprob for token in out.tokens])
        for out in result.completions
    ]


def same(found: list[Told], expected: list[Told]) -> bool:
    """Return whether answers are the same, log-probabilities to rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        for (text, pieces, log_probs), (other, others, expected_log_probs) in zip(ours, theirs, strict=True):
            if (text, pieces) != (other, others) or log_probs != pytest.approx(expected_log_probs, abs=1e-4):
                return False
    return True


def answers_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of requests that an engine is asked to answer, with each list of them."""
    answered: list[int] = []
    answer = Engine.answer

    def counted(engine: Engine, requests: Any, progress: Any = None) -> Any:
        answered.append(len(requests))
        return answer(engine, requests, progress)

    monkeypatch.setattr(Engine, "answer", counted)
    return answered


def test_it_answers_as_helms_own_client(alone: Path, causal_families: Any) -> None:
    """Texts at temperature 0, and the log-probabilities of prompts, on the same weights."""
    expert = causal_families("llama").recipe["experts"]["mmlu"]
    tokenizer = HuggingFaceTokenizer(BlackHoleCacheConfig(), "twin/tiny", pretrained_model_name_or_path=expert)
    theirs = HuggingFaceClient(
        BlackHoleCacheConfig(), tokenizer, pretrained_model_name_or_path=expert, apply_chat_template=False, device="cpu"
    )
    ours = client(alone)
    for request in (*asks(), *asks(3, stop_sequences=["dog"]), *asks(3, max_tokens=1, top_k_per_token=5)):
        found, expected = (served.make_request(request).completions[0] for served in (ours, theirs))
        assert found.text == expected.text
        assert [token.text for token in found.tokens] == [token.text for token in expected.tokens]
        assert all(abs(token.logprob) < 1e-3 for token in expected.tokens)  # at a temperature of 1e-7
        assert any(token.logprob < -1 for token in found.tokens)
    for request in asks(5, echo_prompt=True, max_tokens=0):
        found, expected = (served.make_request(request).completions[0] for served in (ours, theirs))
        assert found.text == expected.text
        assert [t.logprob for t in found.tokens] == pytest.approx([t.logprob for t in expected.tokens], abs=1e-4)


def test_log_probabilities_are_the_dense_models(three: Path, causal_families: Any) -> None:
    """Of generated tokens, under each prompt's own fused model, in float64; and of the prompt."""
    ours, twin = client(three), TwinModel.from_pretrained(three)
    for generated, scored in zip(asks(5), asks(5, echo_prompt=True, max_tokens=0), strict=True):
        ids = twin.tokenizer(generated.prompt)["input_ids"]
        model = dense(causal_families("llama"), twin.route(torch.tensor([ids]))[0])
        found = ours.make_request(generated).completions[0]
        text = torch.tensor([ids])
        for token in found.tokens:
            with torch.no_grad():
                log_probs = model(text).logits[0, -1].log_softmax(dim=-1)
            best = int(log_probs.argmax())
            assert token.text == twin.tokenizer.decode([best])
            assert token.logprob == pytest.approx(float(log_probs[best]), abs=1e-4)
            text = torch.cat([text, torch.tensor([[best]])], dim=1)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        expected = [0.0, *(float(logits[place, token]) for place, token in enumerate(ids[1:]))]
        told_of = ours.make_request(scored).completions[0]
        assert [token.logprob for token in told_of.tokens] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7, "random": "1"}, {"num_completions": 3, "temperature": 2.0}]
)
def test_threads_lists_and_single_requests_agree(
    three: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asks(**changes)
    one_by_one = [told(client(three, batch_size=1).make_request(request)) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        together = client(three, batch_size=8)
        assert same(list(map(told, pool.map(together.make_request, requests[::-1]))), one_by_one[::-1])
    whole = client(three, batch_size=4)
    answered = answers_of(monkeypatch)
    whole.prepare(requests)
    assert answered == [len(requests)]
    assert same([told(whole.make_request(request)) for request in requests], one_by_one)
    assert answered == [len(requests)]  # they were ready
    assert same([told(whole.make_request(request)) for request in requests], one_by_one)
    assert sum(answered) == 2 * len(requests)  # and were given away with that
    assert len({str(answer) for answer in one_by_one}) > 1
    if changes.get("num_completions"):
        assert len({text for answer in one_by_one for text, _, _ in answer}) > len(requests)


def test_a_stop_sequence_ends_tokens_and_log_probability_in_any_company(three: Path) -> None:
    """Alone, among eight threads and in a list; and each completion says why it ended."""
    free = [client(three).make_request(request).completions[0] for request in asks(8, max_tokens=12)]
    stop = free[0].tokens[1].text
    requests = asks(8, max_tokens=12, stop_sequences=[stop])
    one_by_one = [client(three, batch_size=1).make_request(request).completions[0] for request in requests]
    with ThreadPoolExecutor(8) as pool:
        together = [result.completions[0] for result in pool.map(client(three).make_request, requests)]
    whole = client(three, batch_size=3)
    whole.prepare(requests)
    for found in (together, [whole.make_request(request).completions[0] for request in requests]):
        for ours, alone in zip(found, one_by_one, strict=True):
            assert (ours.text, ours.finish_reason) == (alone.text, alone.finish_reason)
            assert len(ours.tokens) == len(alone.tokens)
            assert ours.logprob == pytest.approx(alone.logprob, abs=1e-4)
    for found, uncut in zip(one_by_one, free, strict=True):
        assert found.text == uncut.text.partition(stop)[0]
        assert found.finish_reason == {"reason": "stop" if stop in uncut.text else "length"}
        assert found.logprob == pytest.approx(sum(token.logprob for token in found.tokens))
        kept = zip(found.tokens, uncut.tokens, strict=False)
        assert all(ours.logprob == pytest.approx(theirs.logprob, abs=1e-4) for ours, theirs in kept)
        assert len(found.tokens) < 12 or stop not in uncut.text
    assert {found.finish_reason["reason"] for found in one_by_one} == {"stop", "length"}


def test_random_draws_again(three: Path) -> None:
    ours = client(three)
    first, again, other = (asks(6, temperature=1.5, random=seed) for seed in ("1", "1", "2"))
    drawn = [[told(ours.make_request(request)) for request in requests] for requests in (first, again, other)]
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


def test_one_engine_is_loaded_whatever_the_threads(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(three, tmp_path / "twin")  # which no other test has loaded
    loads = []
    load = TwinModel.from_pretrained

    def counted(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(TwinModel, "from_pretrained", counted)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda request: client(tmp_path / "twin").make_request(request), asks(8)))
    assert all(result.success for result in results)
    assert len(loads) == 1


def test_the_cache_serves_the_same_twin_and_no_other(
    three: Path, causal_families: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SqliteCacheConfig(str(tmp_path / "cache.sqlite"))
    requests = asks(3)
    cold = [client(three, cache).make_request(request) for request in requests]
    warm = [client(three, cache).make_request(request) for request in requests]
    assert [result.cached for result in (*cold, *warm)] == [False] * 3 + [True] * 3
    assert list(map(told, cold)) == list(map(told, warm))
    answered = answers_of(monkeypatch)
    client(three, cache).prepare(requests)
    assert not sum(answered)  # nothing is computed that the cache holds
    recipe = causal_families("llama").recipe
    recipe = {**recipe, "router": {**recipe["router"], "kind": "linear"}}
    build_twin(Recipe.model_validate(recipe), tmp_path / "other-router")
    assert not client(tmp_path / "other-router", cache).make_request(requests[0]).cached
    assert not client(three, cache, protocol="routed").make_request(requests[0]).cached


@pytest.mark.parametrize(
    ("changes", "says", "is_fatal"),
    [
        ({"prompt": "cat " * 80}, "the model's window is 64", False),
        ({"prompt": "cat " * 80, "echo_prompt": True, "max_tokens": 0}, "the model's window is 64", False),
        ({"prompt": ""}, "an empty prompt", False),
        ({"max_tokens": 64}, "leaves no room for a prompt; the model's window is 64", True),
        ({"max_tokens": 0}, "a request for no tokens", True),
        ({"messages": [{"role": "user", "content": "cat"}], "prompt": ""}, "apply_chat_template: false", True),
        ({"prompt": "a \ud800"}, "character 2 of the prompt is half of a surrogate pair", False),
        ({"temperature": -1}, "temperature must be a finite number, 0 or more, not -1", True),
        ({"temperature": math.nan}, "temperature must be a finite number, 0 or more, not nan", True),
        ({"temperature": None}, "temperature must be a finite number, 0 or more, not None", True),
        ({"top_p": 1.5}, "top_p must be a number, 0 to 1, not 1.5", True),
        ({"top_p": "1"}, "top_p must be a number, 0 to 1, not '1'", True),
        ({"num_completions": 0}, "num_completions must be a whole number, 1 or more, not 0", True),
        ({"max_tokens": -1}, "max_tokens must be a whole number, 0 or more, not -1", True),
    ],
)
def test_what_cannot_succeed_fails_once_with_its_reason(
    three: Path, changes: dict[str, Any], says: str, is_fatal: bool
) -> None:
    """What is wrong with one request is not fatal: HELM goes on without it."""
    ours = client(three)
    request = dataclasses.replace(asks(1)[0], **changes)
    with ThreadPoolExecutor(2) as pool:  # beside a request that can be answered
        failed, fine = pool.map(ours.make_request, [request, asks(1)[0]])
    assert fine.success
    assert not failed.success
    assert says in failed.error
    assert failed.error_flags.is_fatal == is_fatal
    assert failed.error_flags.is_retriable is False
    ours.prepare([request, asks(2)[1]])  # does not raise: make_request reports the error
    assert ours.make_request(asks(2)[1]).success


def test_whole_numbers_are_temperatures(three: Path) -> None:
    """A run entry says temperature=1, which HELM reads as a whole number."""
    ours = client(three)
    for whole in (0, 1):
        found, expected = (
            ours.make_request(asks(1, temperature=number, top_p=1)[0]) for number in (whole, float(whole))
        )
        assert told(found) == told(expected)


def test_a_twin_that_is_damaged_or_none(three: Path, families: Any, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path / "damaged")
    (tmp_path / "damaged" / "router" / "config.json").write_text("{}")
    build_twin(Recipe.model_validate({**families("bert").recipe, "router": None}), tmp_path / "classifier")
    for name, says in (
        ("damaged", "edited or damaged"),
        ("nothing", "no twin there"),
        ("classifier", "does not generate"),
    ):
        result = client(tmp_path / name).make_request(asks(1)[0])
        assert not result.success
        assert says in result.error
        assert result.error_flags == ErrorFlags(is_retriable=False, is_fatal=True)


def test_a_failed_load_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def broken(directory: str, **options: Any) -> None:
        loads.append(directory)
        raise OSError("the disk is gone\nsecond line")

    monkeypatch.setattr(TwinModel, "from_pretrained", broken)
    ours = client(tmp_path / "broken")
    ours.prepare(asks(20))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(ours.make_request, asks(20)))
    assert len(loads) == 1
    for result in results:
        assert result.error == f"{tmp_path / 'broken'}: can't be loaded (the disk is gone)"
        assert result.error_flags.is_fatal


@pytest.mark.parametrize(
    ("option", "value"),
    [("tolerance", -1), ("batch_size", 0), ("dtype", "int8"), ("device", "gpu9"), ("protocol", "x")],
)
def test_a_wrong_setting_is_named(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"HELM's deployment of my-twin: {option}: .*"):
        TwinClient(BlackHoleCacheConfig(), "my-twin", **{option: value})


def test_auto_is_the_default_device(three: Path) -> None:
    """It shares the engine of a client that says nothing."""
    engines = [TwinClient(BlackHoleCacheConfig(), str(three), device=device).engine for device in ("auto", None)]
    assert engines[0] is engines[1]
    assert engines[0].twin.device == usable_device("auto")


def test_cached_answers_are_plain_data(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = client(three)
    kept = []
    get = ours.cache.get

    def watched(key: Any, compute: Any) -> Any:
        response, cached = get(key, compute)
        kept.append(response)
        return response, cached

    monkeypatch.setattr(ours.cache, "get", watched)
    assert ours.make_request(asks(1)[0]).success
    (response,) = kept
    assert response["completions"]
    assert response["request_time"] > 0
    assert json.loads(json.dumps(response)) == response
