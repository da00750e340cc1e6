"""HELM's client of a twin, and a runner that gives the client whole lists of requests."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import Executor
from helm.benchmark.runner import Runner
from helm.clients.client import CachingClient, truncate_sequence
from helm.common.cache import CacheConfig
from helm.common.hierarchical_logger import hlog
from helm.common.request import (
    EMBEDDING_UNAVAILABLE_REQUEST_RESULT,
    ErrorFlags,
    GeneratedOutput,
    Request,
    RequestResult,
    Token,
)
from tqdm import tqdm  # type: ignore[import-untyped]

from twin_bench.config import parse
from twin_bench.errors import InputError, RefusedError, shown
from twin_bench.files import digest
from twin_bench.serving.engine import Ask, Engine, engine
from twin_bench.serving.prompts import encoded
from twin_bench.serving.settings import TwinSettings
from twin_bench.twin.sampling import Completion
from twin_bench_helm.prompts import in_template

FORMAT = 3
"""The number of what the cache holds of an answer, and of how the answer is found."""
CHUNK = 16
"""How many full batches of requests are answered before their answers go into the cache."""


class TwinClient(CachingClient):  # type: ignore[misc]
    """Answers HELM's requests with a twin: completions, and log-probabilities of generated and of prompt tokens.

    The engine is loaded by the first request, once in a process. The cache key holds all settings and the digests of
    the shared expert, the experts and the router, so another twin's answers are never served. An error is never
    retried. Where one request can't be answered, such as one over the model's window, the error is not fatal: HELM goes
    on, and scores an empty completion. An error that concerns every request is fatal.
    """

    def __init__(
        self,
        cache_config: CacheConfig,
        twin: str,
        device: str | None = None,
        dtype: str | None = None,
        protocol: str = "standard",
        tolerance: float | None = None,
        batch_size: int = 8,
        compile: str = "off",
        apply_chat_template: bool = False,
        device_map: str | dict[str, str | int] | None = None,
        max_memory: dict[int | str, int | str] | int | str | None = None,
        offload_folder: str | None = None,
        quantization: str | dict[str, Any] | None = None,
    ) -> None:
        """Make a client of the twin in the directory `twin`. `twin-bench helm-config` has the same other arguments.

        Raises:
            InputError: a setting that is unknown or out of range.
        """
        super().__init__(cache_config=cache_config)
        given = {
            "device": device,
            "dtype": dtype,
            "protocol": protocol,
            "tolerance": tolerance,
            "batch_size": batch_size,
            "compile": compile,
            "device_map": device_map,
            "max_memory": max_memory,
            "offload_folder": offload_folder,
            "quantization": quantization,
        }
        self._settings = parse(TwinSettings, given, f"HELM's deployment of {twin}")
        self._directory, self._chat = twin, apply_chat_template
        self._ready: dict[str, list[dict[str, Any]]] = {}

    @property
    def engine(self) -> Engine:
        """The process's engine. Getting it raises an InputError if the twin can't be loaded."""
        return engine(self._directory, self._settings)

    def make_request(self, request: Request) -> RequestResult:
        """Answer one request, from the cache if it holds the answer. Its time is its share of its batch's time."""
        if request.embedding:
            return EMBEDDING_UNAVAILABLE_REQUEST_RESULT
        try:
            ask = self._ask(request)
            key = CachingClient.make_cache_key(self._key(ask), request)
            ready = self._ready.get(digest(key))
            if ready:
                response, cached = ready.pop(), False
            else:
                response, cached = self.cache.get(key, lambda: _raw(self.engine.ask(ask)))
        except RefusedError as error:
            return _failed(str(error), is_fatal=False)
        except InputError as error:
            return _failed(str(error), is_fatal=True)
        return RequestResult(
            success=True,
            cached=cached,
            request_time=response["request_time"],
            request_datetime=response["request_datetime"],
            completions=[self._output(raw, request) for raw in response["completions"]],
            embedding=[],
        )

    def prepare(self, requests: Sequence[Request]) -> None:
        """Answer all requests whose answers the cache does not hold. `make_request` then returns the answers.

        The requests are answered in chunks. The answers of a chunk are in the cache before the next one begins. Equal
        requests are answered once.
        """
        asked: dict[str, tuple[Any, Ask]] = {}
        wanted: Counter[str] = Counter()
        for request in requests:
            try:
                ask = self._ask(request)
                key = CachingClient.make_cache_key(self._key(ask), request)
            except InputError:
                continue  # make_request reports the error
            asked[digest(key)] = key, ask
            wanted[digest(key)] += 1
        missing = [place for place, (key, _) in asked.items() if not self._holds(key)]
        answered, size = 0, CHUNK * self._settings.batch_size
        with tqdm(total=2 * len(missing), desc="Running the twin", unit="step", disable=None) as bar:
            for chunk in (missing[start : start + size] for start in range(0, len(missing), size)):
                answers = self.engine.answer([asked[place][1] for place in chunk], bar.update)
                for place, answer in zip(chunk, answers, strict=True):
                    if isinstance(answer, RefusedError):
                        continue  # make_request reports the error
                    raw = _raw(answer)
                    self.cache.get(asked[place][0], functools.partial(dict, raw))
                    self._ready[place] = [raw] * wanted[place]
                    answered += 1
                hlog(f"The twin has answered {answered} of {len(missing)} requests")

    def _holds(self, key: Any) -> bool:
        """Return whether the cache holds an answer."""
        try:
            self.cache.get(key, _miss)
        except _Miss:
            return False
        return True

    def _ask(self, request: Request) -> Ask:
        twin = self.engine.twin
        text = request.prompt
        if request.messages and not self._chat:
            raise InputError("a request with messages, and the deployment says apply_chat_template: false")
        if self._chat:
            text = in_template(twin.tokenizer, request.messages or [{"role": "user", "content": text}])
        _require_ranges(request)
        if not request.max_tokens and not request.echo_prompt:
            raise InputError(
                "a request for no tokens; with echo_prompt it would ask for the prompt's log-probabilities"
            )
        if request.max_tokens >= twin.max_length:
            raise InputError(
                f"max_tokens {request.max_tokens} leaves no room for a prompt; the model's window is {twin.max_length}"
            )
        return Ask(
            prompt=tuple(encoded(twin.tokenizer, text, templated=self._chat)),
            max_tokens=request.max_tokens,
            temperature=float(request.temperature),
            top_p=float(request.top_p),
            completions=request.num_completions,
            stop=tuple(request.stop_sequences),
            seed=f"{request.random}/{text}",
        )

    def _key(self, ask: Ask) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **self.engine.identity,
            "prompt": list(ask.prompt),
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "completions": ask.completions,
            "stop": list(ask.stop),
        }

    def _output(self, raw: dict[str, Any], request: Request) -> GeneratedOutput:
        """Return a completion in HELM's form: cut at the first stop sequence, or after the prompt if it is echoed."""
        tokenizer = self.engine.twin.tokenizer
        ids, log_probs = raw["tokens"], raw["log_probs"]
        output = GeneratedOutput(
            text=tokenizer.decode(ids),
            logprob=sum(log_probs),
            tokens=[Token(text=tokenizer.decode([i]), logprob=p) for i, p in zip(ids, log_probs, strict=True)],
        )
        if not request.echo_prompt:
            output = truncate_sequence(output, request, print_warning=False)
        elif request.max_tokens:
            prompt = tokenizer(request.prompt)["input_ids"]
            echoed = [Token(text=tokenizer.decode([i]), logprob=0.0) for i in prompt]
            output = GeneratedOutput(request.prompt + output.text, output.logprob, [*echoed, *output.tokens])
        return dataclasses.replace(output, finish_reason={"reason": raw["finish_reason"]})


def _require_ranges(request: Request) -> None:
    """Raise an InputError that names a number of a request that is out of its range. A run's requests share them."""
    for name, kind, least, most, says in (
        ("temperature", (int, float), 0, sys.float_info.max, "a finite number, 0 or more"),
        ("top_p", (int, float), 0, 1, "a number, 0 to 1"),
        ("max_tokens", int, 0, sys.maxsize, "a whole number, 0 or more"),
        ("num_completions", int, 1, sys.maxsize, "a whole number, 1 or more"),
    ):
        value = getattr(request, name)
        if not isinstance(value, kind) or not least <= value <= most:
            raise InputError(f"{name} must be {says}, not {shown(value)}")


class BatchExecutor(Executor):  # type: ignore[misc]
    """Gives a twin a scenario's whole list of requests, before HELM's threads send them one by one."""

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Answer all requests of a scenario."""
        if not self.execution_spec.dry_run:
            asked: dict[str, list[Request]] = {}
            for state in scenario_state.request_states:
                asked.setdefault(state.request.model_deployment, []).append(state.request)
            context: Any = self.context  # a LocalContext has clients, a remote context has none
            for deployment, requests in asked.items() if hasattr(context, "client") else ():
                client = context.client._get_client(deployment)
                if isinstance(client, TwinClient):
                    client.prepare(requests)
        return super().execute(scenario_state)


class BatchRunner(Runner):  # type: ignore[misc]
    """The runner of `helm-run --runner-class-name twin_bench_helm.client.BatchRunner`. Its batches do not vary."""

    def __init__(self, execution_spec: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(execution_spec, *arguments, **named)
        self.executor = BatchExecutor(execution_spec)


class _Miss(Exception):  # noqa: N818 (a signal, not an error)
    """The cache does not hold the answer."""


def _miss() -> dict[str, Any]:
    raise _Miss


def _raw(completions: Sequence[Completion]) -> dict[str, Any]:
    """Return completions as the plain data that HELM's cache keeps."""
    return {
        "completions": [
            {"tokens": found.tokens, "log_probs": found.log_probs, "finish_reason": found.finish_reason}
            for found in completions
        ],
        "request_time": sum(found.seconds for found in completions),
        "request_datetime": int(time.time()),
    }


def _failed(message: str, *, is_fatal: bool) -> RequestResult:
    flags = ErrorFlags(is_retriable=False, is_fatal=is_fatal)
    return RequestResult(success=False, cached=False, error=message, completions=[], embedding=[], error_flags=flags)
