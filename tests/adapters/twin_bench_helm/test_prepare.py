"""Whole lists of requests: chunks, the cache between them, equal requests, and the runner that hands them over."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helm.benchmark.adaptation.adapter_spec import AdapterSpec
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec
from helm.benchmark.scenarios.scenario import Input, Instance
from helm.common.authentication import Authentication
from helm.common.cache import BlackHoleCacheConfig, SqliteCacheConfig
from helm.common.request import Request

from tests.support.models import WORDS
from twin_bench.serving.engine import Engine
from twin_bench_helm import client as module
from twin_bench_helm.client import BatchExecutor, TwinClient

pytestmark = pytest.mark.versions

DEPLOYMENT = "twin_merged/tiny"
LONG = "cat " * 80
"""A prompt over the window."""


def requests_of(count: int, **changes: Any) -> list[Request]:
    draw = random.Random(3)
    request = Request(model=DEPLOYMENT, model_deployment=DEPLOYMENT, temperature=0.0, max_tokens=3)
    prompts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(count)]
    return [dataclasses.replace(request, prompt=prompt, **changes) for prompt in prompts]


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list that grows by the size of each list that an engine answers. Chunks are of one batch."""
    monkeypatch.setattr(module, "CHUNK", 1)
    sizes: list[int] = []
    answer = Engine.answer

    def counted(engine: Engine, requests: Any, progress: Any = None) -> Any:
        sizes.append(len(requests))
        return answer(engine, requests, progress)

    monkeypatch.setattr(Engine, "answer", counted)
    return sizes


def test_what_was_answered_before_an_interrupt_is_in_the_cache(
    three: Path, tmp_path: Path, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SqliteCacheConfig(str(tmp_path / "cache.sqlite"))
    requests = requests_of(10)
    with pytest.MonkeyPatch.context() as patch:
        counted = Engine.answer

        def interrupted(engine: Engine, asked: Any, progress: Any = None) -> Any:
            if len(chunks) == 2:
                raise KeyboardInterrupt
            return counted(engine, asked, progress)

        patch.setattr(Engine, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TwinClient(cache, str(three), device="cpu", batch_size=4).prepare(requests)
    assert chunks == [4, 4]
    again = TwinClient(cache, str(three), device="cpu", batch_size=4)
    again.prepare(requests)
    assert chunks == [4, 4, 2]
    results = [again.make_request(request) for request in requests]
    assert chunks == [4, 4, 2]
    assert [result.cached for result in results] == [True] * 8 + [False] * 2
    assert all(result.success for result in results)
    assert all(again.make_request(request).cached for request in requests)


def test_equal_requests_are_answered_once_without_a_cache(three: Path, chunks: list[int]) -> None:
    ours = TwinClient(BlackHoleCacheConfig(), str(three), device="cpu", batch_size=4)
    requests = requests_of(3) * 5
    ours.prepare(requests)
    results = [ours.make_request(request) for request in requests]
    assert chunks == [3]
    assert [result.completions for result in results] == [result.completions for result in results[:3]] * 5


def test_one_long_prompt_does_not_lose_the_plan_of_the_rest(
    three: Path, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "hlog", said.append)
    ours = TwinClient(BlackHoleCacheConfig(), str(three), device="cpu", batch_size=8)
    requests = requests_of(6)
    requests[2] = dataclasses.replace(requests[2], prompt=LONG)
    ours.prepare(requests)
    assert chunks == [6]
    assert said == ["The twin has answered 5 of 6 requests"]
    results = [ours.make_request(request) for request in requests]
    assert [result.success for result in results] == [True, True, False, True, True, True]
    assert chunks == [6, 1]


def test_the_time_of_a_request_is_its_share(three: Path) -> None:
    """Alone and in a list, and not the time that it waited."""
    ours = TwinClient(BlackHoleCacheConfig(), str(three), device="cpu", batch_size=8)
    requests = [*requests_of(8), *requests_of(8, max_tokens=1, num_completions=2), *requests_of(8, max_tokens=12)]
    ours.prepare(requests)
    times = [ours.make_request(request).request_time for request in requests]
    assert min(times) > 0
    assert sum(times[:8]) < sum(times[16:])
    assert ours.make_request(requests[0]).request_time > 0


def test_helm_goes_on_without_an_instance_that_can_not_be_answered(
    three: Path, tmp_path: Path, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor asks for whole lists. HELM scores an empty completion, and keeps the reason."""
    ours = TwinClient(BlackHoleCacheConfig(), str(three), device="cpu", batch_size=8)
    specification = ExecutionSpec(url=None, auth=Authentication(""), local_path=str(tmp_path), parallelism=2)
    executor = BatchExecutor(specification)
    monkeypatch.setattr(executor, "context", SimpleNamespace(client=SimpleNamespace(_get_client=lambda _: ours)))
    executor.context.make_request = ours.make_request
    requests = requests_of(4)
    requests[1] = dataclasses.replace(requests[1], prompt=LONG)
    states = [
        RequestState(Instance(Input("x"), []), None, None, 0, None, request, None, 1, False) for request in requests
    ]
    done = executor.execute(ScenarioState(AdapterSpec(), states)).request_states
    assert chunks == [4, 1]
    assert [bool(state.result.completions[0].tokens) for state in done] == [True, False, True, True]
    assert "the model's window is 64" in done[1].result.error
