"""HELM's client of a twin, and a runner that gives the client whole lists of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import Executor
from helm.benchmark.runner import Runner
from helm.clients.client import CachingClient, truncate_sequence
from helm.common.cache import CacheConfig
from helm.common.request import (
    EMBEDDING_UNAVAILABLE_REQUEST_RESULT,
    ErrorFlags,
    GeneratedOutput,
    Request,
    RequestResult,
    Token,
    wrap_request_time,
)

from twin_bench.errors import InputError
from twin_bench.twin.sampling import Completion
from twin_bench_helm.engine import Ask, Engine, engine


class TwinClient(CachingClient):  # type: ignore[misc]
    """Answers HELM's requests with a twin: completions, and log-probabilities of generated and of prompt tokens.

    The engine is loaded by the first request, once in a process. The cache key holds all settings and the digests of
    the shared expert, the experts and the router, so another twin's answers are never served. A request that can't
    succeed fails at once, and HELM does not retry it.
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
        apply_chat_template: bool = False,
    ) -> None:
        """Make a client of the twin in the directory `twin`. `twin-bench helm-config` has the same other arguments."""
        super().__init__(cache_config=cache_config)
        self._settings: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "protocol": protocol,
            "tolerance": tolerance,
            "batch_size": batch_size,
        }
        self._directory, self._chat = twin, apply_chat_template
        self._ready: dict[str, dict[str, Any]] = {}

    @property
    def engine(self) -> Engine:
        """The process's engine. Getting it raises an InputError if the twin can't be loaded."""
        return engine(self._directory, **self._settings)

    def make_request(self, request: Request) -> RequestResult:
        """Answer one request, from the cache if it holds the answer."""
        if request.embedding:
            return EMBEDDING_UNAVAILABLE_REQUEST_RESULT
        try:
            ask = self._ask(request)
            key = CachingClient.make_cache_key(self._key(ask), request)

            def compute() -> dict[str, Any]:
                ready = self._ready.pop(repr(key), None)
                return ready if ready is not None else self._raw(self.engine.ask(ask))

            response, cached = self.cache.get(key, wrap_request_time(compute))
        except InputError as error:
            return _failed(str(error))
        return RequestResult(
            success=True,
            cached=cached,
            request_time=response["request_time"],
            request_datetime=response.get("request_datetime"),
            completions=[self._output(raw, request) for raw in response["completions"]],
            embedding=[],
        )

    def prepare(self, requests: Sequence[Request]) -> None:
        """Answer, in one list, all requests whose answers the cache does not hold. `make_request` then returns them."""
        asks: dict[str, Ask] = {}
        for request in requests:
            try:
                ask = self._ask(request)
                key = CachingClient.make_cache_key(self._key(ask), request)
                self.cache.get(key, _miss)
            except _Miss:
                asks[repr(key)] = ask
            except InputError:
                continue  # make_request reports the error
        try:
            answers = self.engine.answer(list(asks.values()))
        except InputError:
            return  # one request can't be answered, so make_request answers each separately
        self._ready.update({key: self._raw(answer) for key, answer in zip(asks, answers, strict=True)})

    def _ask(self, request: Request) -> Ask:
        tokenizer = self.engine.twin.tokenizer
        text = request.prompt
        if request.messages and not self._chat:
            raise InputError("a request with messages, and the deployment says apply_chat_template: false")
        if self._chat:
            if not tokenizer.chat_template:
                raise InputError(
                    f"{self._directory}: its tokenizer has no chat template; set apply_chat_template: false"
                )
            messages = request.messages or [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not request.max_tokens and not request.echo_prompt:
            raise InputError(
                "a request for no tokens; with echo_prompt it would ask for the prompt's log-probabilities"
            )
        return Ask(
            prompt=tuple(tokenizer(text)["input_ids"]),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            completions=request.num_completions,
            stop=tuple(request.stop_sequences),
            seed=f"{request.random}/{text}",
        )

    def _key(self, ask: Ask) -> dict[str, Any]:
        twin = self.engine.twin
        return {
            "digests": twin.digests,
            "protocol": twin.protocol,
            "tolerance": twin.tolerance,
            "sensitivity": twin.sensitivity,
            "dtype": str(twin.model.dtype),
            "prompt": list(ask.prompt),
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "completions": ask.completions,
            "stop": list(ask.stop),
        }

    def _raw(self, completions: Sequence[Completion]) -> dict[str, Any]:
        return {"completions": [{"tokens": found.tokens, "log_probs": found.log_probs} for found in completions]}

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
            return truncate_sequence(output, request, print_warning=False)
        if request.max_tokens:
            prompt = tokenizer(request.prompt)["input_ids"]
            echoed = [Token(text=tokenizer.decode([i]), logprob=0.0) for i in prompt]
            return GeneratedOutput(request.prompt + output.text, output.logprob, [*echoed, *output.tokens])
        return output


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


def _failed(message: str) -> RequestResult:
    flags = ErrorFlags(is_retriable=False, is_fatal=True)
    return RequestResult(success=False, cached=False, error=message, completions=[], embedding=[], error_flags=flags)
