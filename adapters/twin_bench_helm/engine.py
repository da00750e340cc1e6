"""The engine: one twin for the whole process. It answers together what HELM's threads ask at the same time.

The answer to a request depends only on the request. It does not depend on the batch, because each row has its own
fusion weights, or on the number of threads. A sampled answer depends on the request's seed and not on earlier draws.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from twin_bench.errors import InputError
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.device import AUTO
from twin_bench.twin.model import TwinModel
from twin_bench.twin.parts import PROTOCOLS, ProtocolName
from twin_bench.twin.requests import Generate, Score, generate, score
from twin_bench.twin.sampling import Completion, Sampling

GATHER_SECONDS = 0.01
"""The time for which the engine waits for another request before it answers those it has."""


@dataclass(frozen=True)
class Ask:
    """One request of HELM's: the prompt's tokens, and how to continue them.

    `max_tokens` 0 asks for the log-probabilities of the prompt's own tokens.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    completions: int
    stop: tuple[str, ...]
    seed: str


class Engine:
    """Answers lists of requests with one twin. It also collects single requests of many threads into lists.

    `task` is the task of all requests. It is needed only where the twin's routing is `task`.
    """

    def __init__(self, twin: TwinCausalLM, batch_size: int, task: str | None = None) -> None:
        self.twin, self.batch_size, self._task = twin, batch_size, task
        self._waiting: queue.SimpleQueue[tuple[Ask, Future[list[Completion]]]] = queue.SimpleQueue()
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._server: threading.Thread | None = None

    def ask(self, request: Ask) -> list[Completion]:
        """Return the completions of one request. Requests of other threads may share its batches."""
        with self._starting:
            if self._server is None:
                self._server = threading.Thread(target=self._serve, name="twin-bench engine", daemon=True)
                self._server.start()
        future: Future[list[Completion]] = Future()
        self._waiting.put((request, future))
        return future.result()

    def answer(self, requests: Sequence[Ask]) -> list[list[Completion]]:
        """Return the completions of each request, in order. Raise an InputError if one can't be answered."""
        generated = {row: self._generate(one) for row, one in enumerate(requests) if one.max_tokens}
        scored = {row: self._score(one) for row, one in enumerate(requests) if not one.max_tokens}
        with self._lock:
            completions = generate(self.twin, list(generated.values()), batch_size=self.batch_size)
            # A prompt of one token has nothing to score after its context.
            asked = {row: one for row, one in scored.items() if one.continuation}
            scores = score(self.twin, list(asked.values()), batch_size=self.batch_size)
        answers = dict(zip(generated, completions, strict=True))
        found = dict(zip(asked, scores, strict=True))
        for row in scored:
            after = found[row].log_probs.tolist() if row in found else []
            answers[row] = [Completion(list(requests[row].prompt), [0.0, *after])]
        return [answers[row] for row in range(len(requests))]

    def _generate(self, request: Ask) -> Generate:
        return Generate(
            prompt=request.prompt,
            max_new_tokens=request.max_tokens,
            decoding=Sampling(request.temperature, request.top_p, request.stop),
            completions=request.completions,
            seed=request.seed,
            task=self._task,
        )

    def _score(self, request: Ask) -> Score:
        """Return the request for a prompt's own log-probabilities. By HELM's convention the first token's is 0.

        HELM does not say where the context ends in such a prompt, so the router reads the whole prompt.
        """
        if not request.prompt:
            raise InputError("an empty prompt: nothing to score or to route on")
        return Score(request.prompt[:1], request.prompt[1:], routed_on=request.prompt, task=self._task)

    def _serve(self) -> None:
        while True:
            waiting = [self._waiting.get()]
            while len(waiting) < self.batch_size:
                try:
                    waiting.append(self._waiting.get(timeout=GATHER_SECONDS))
                except queue.Empty:
                    break
            try:
                answers = self.answer([request for request, _ in waiting])
            except InputError:  # one request can't be answered, so each is answered separately
                for request, future in waiting:
                    self._settle(request, future)
                continue
            except Exception as error:  # any other error is raised in every waiting thread
                for _, future in waiting:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(waiting, answers, strict=True):
                future.set_result(answer)

    def _settle(self, request: Ask, future: Future[list[Completion]]) -> None:
        """Answer one request, or have its error raised in the thread that made it."""
        try:
            future.set_result(self.answer([request])[0])
        except Exception as error:
            future.set_exception(error)


_ENGINES: dict[tuple[str, str | None, str | None, str, float | None, int], Engine] = {}
_LOADING = threading.Lock()


def hold(name: str, twin: TwinCausalLM, batch_size: int, task: str) -> None:
    """Make `engine(name, ...)` return an engine of a twin that is in memory.

    `name` stands in place of a directory and begins with twin_merged/. `task` is the task of all requests. Only the
    last twin is held: a leaderboard evaluates one after the other.
    """
    with _LOADING:
        for key in [key for key in _ENGINES if key[0].startswith("twin_merged/")]:
            del _ENGINES[key]
        _ENGINES[(name, None, None, "standard", None, batch_size)] = Engine(twin, batch_size, task)


def engine(
    directory: str,
    *,
    device: str | None,
    dtype: str | None,
    protocol: ProtocolName,
    tolerance: float | None,
    batch_size: int,
) -> Engine:
    """Return the process's engine for a twin and its settings. The first thread that asks loads the twin.

    Args:
        directory: the twin's directory, or the name of a twin in memory.
        device: by default a GPU if there is one, else the CPU.
        dtype: a torch dtype's name; by default that of the shared expert.
        protocol: standard, paper or routed.
        tolerance: the allowed relative error of the logits: see `TwinModel.from_pretrained`.
        batch_size: the largest number of rows in a forward.

    Raises:
        InputError: an unknown protocol, or a twin that can't be loaded or does not generate text.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    key = (directory, device, dtype, protocol, tolerance, batch_size)
    with _LOADING:
        if key not in _ENGINES:
            twin = TwinModel.from_pretrained(
                directory, device=device or AUTO, dtype=dtype, protocol=protocol, tolerance=tolerance
            )
            if not isinstance(twin, TwinCausalLM):
                raise InputError(f"{directory}: a classifier twin does not generate text; HELM asks for text")
            _ENGINES[key] = Engine(twin, batch_size)
        return _ENGINES[key]
