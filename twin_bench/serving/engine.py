"""The engine: one twin for the whole process. It answers together what a harness's threads ask at the same time.

The answer to a request depends only on the request. It does not depend on the batch, because each row has its own
fusion weights, or on the number of threads. A sampled answer depends on the request's seed and not on earlier draws.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from twin_bench.checkpoints.quantization import config_keys
from twin_bench.errors import InputError, NotFiniteError, RefusedError, first_line
from twin_bench.serving.settings import TwinSettings
from twin_bench.twin.causal import NOT_CAUSAL, TwinCausalLM
from twin_bench.twin.device import AUTO
from twin_bench.twin.model import TwinModel
from twin_bench.twin.requests import Generate, Progress, Score, Scored, check_generate, generate, require_texts, score
from twin_bench.twin.sampling import Completion, Sampling

GATHER_SECONDS = 0.01
"""The time for which the engine waits for another request before it answers those it has."""

_log = logging.getLogger(__name__)


Answer = list[Completion] | RefusedError


@dataclass(frozen=True)
class Ask:
    """One request of a harness: the prompt's tokens, and how to continue them.

    `max_tokens` 0 asks for the log-probabilities of the prompt's own tokens. `likeliest` is how many of the most
    probable tokens are returned of each place of a completion.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    completions: int
    stop: tuple[str, ...]
    seed: str
    top_k: int = 0
    likeliest: int = 0


class Engine:
    """Answers lists of requests with one twin. It also collects single requests of many threads into lists.

    `batch_size` is the largest number of rows in a forward. It is halved when the device's memory does not hold them.
    `task` is the task of all requests. It is needed only where the twin's routing is `task`.
    """

    def __init__(self, twin: TwinCausalLM, batch_size: int, task: str | None = None) -> None:
        self.twin, self.batch_size, self._task = twin, batch_size, task
        self._waiting: queue.SimpleQueue[tuple[Ask, Future[list[Completion]]]] = queue.SimpleQueue()
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._server: threading.Thread | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides an answer beside the request: a cache's key holds it, or another twin's answers are served."""
        quantised = config_keys(self.twin.model.config)
        return {
            "digests": self.twin.digests,
            "protocol": self.twin.protocol,
            "tolerance": self.twin.tolerance,
            "sensitivity": self.twin.sensitivity,
            "dtype": str(self.twin.model.dtype),
            **({} if quantised is None else {"quantization": quantised}),
            **({"draws": "cuda"} if self.twin.device.type == "cuda" else {}),  # other noise than a CPU's
        }

    def ask(self, request: Ask) -> list[Completion]:
        """Return the completions of one request. Requests of other threads may share its batches.

        Raises:
            RefusedError: this request can't be answered.
            InputError: no request can.
        """
        with self._starting:
            if self._server is None:
                self._server = threading.Thread(target=self._serve, name="twin-bench engine", daemon=True)
                self._server.start()
        future: Future[list[Completion]] = Future()
        self._waiting.put((request, future))
        return future.result()

    def answer(self, requests: Sequence[Ask], progress: Progress | None = None) -> list[Answer]:
        """Return the answer to each request, in order: its completions, or why it has none.

        A request whose logits or features are not finite has none. Equal requests are answered once. A completion's
        `seconds` are its share of the time that its batch took.

        Args:
            requests: the requests.
            progress: reports answered requests. It takes them back, as a negative number, where they are asked again.

        Raises:
            InputError: no request can be answered, or the memory does not hold one row.
        """
        answers: dict[Ask, Answer] = {}
        with self._lock:  # the memory that is free is that between two lists
            for request in dict.fromkeys(requests):
                try:
                    self._check(request)
                except InputError as error:
                    answers[request] = RefusedError(str(error))
            possible = [request for request in dict.fromkeys(requests) if request not in answers]
            answers.update(zip(possible, self._finite(possible, progress or _silent), strict=True))
        return [answers[request] for request in requests]

    def _check(self, request: Ask) -> None:
        """Raise an InputError for a request that can't be answered."""
        if request.max_tokens:
            check_generate(self.twin, self._generate(request))
            require_texts(self.twin, [self._generate(request)], self.batch_size)
            return
        self.twin.check_tokens(request.prompt, "prompt")
        if len(request.prompt) > self.twin.max_length + 1:  # the last token is predicted, and is no input
            raise InputError(f"a prompt of {len(request.prompt)} tokens; the model's window is {self.twin.max_length}")
        self.twin.require_room([len(request.prompt) - 1], len(request.prompt) - 1)

    def _finite(self, requests: Sequence[Ask], progress: Progress) -> list[Answer]:
        """Answer a list. It is halved until each request that comes to NaN or inf stands alone, and is refused."""
        try:
            return [*self._within_memory(requests, progress)]
        except NotFiniteError as error:
            reason = str(error)  # the error itself holds the tensors of the frames it went through
        if len(requests) == 1:
            return [RefusedError(reason)]
        half = len(requests) // 2
        return [*self._finite(requests[:half], progress), *self._finite(requests[half:], progress)]

    def _within_memory(self, requests: Sequence[Ask], progress: Progress) -> list[list[Completion]]:
        """Answer a list with as many rows in a forward as the device's memory holds."""
        while True:
            done = 0

            def report(count: int) -> None:
                nonlocal done
                done += count
                progress(count)

            try:
                return self._answered(requests, report)
            except torch.OutOfMemoryError as error:
                reason = first_line(error)  # as in `_finite`
            except NotFiniteError:
                progress(-done)
                raise
            progress(-done)
            if self.batch_size == 1:
                raise InputError(
                    f"the memory of {self.twin.device} does not hold one row ({reason}); use a smaller dtype, or a "
                    "device with more memory"
                )
            self.twin.release()  # it is made anew where it fits
            self.batch_size //= 2
            torch.cuda.empty_cache()
            _log.warning("out of memory: %d rows in a forward from now on", self.batch_size)

    def _answered(self, requests: Sequence[Ask], progress: Progress) -> list[list[Completion]]:
        continued = [request for request in requests if request.max_tokens]
        # A prompt of one token has nothing to score after its context.
        scored = [request for request in requests if not request.max_tokens and len(request.prompt) > 1]
        asked = [self._generate(request) for request in continued]
        completions = generate(self.twin, asked, batch_size=self.batch_size, progress=progress)
        begun = time.perf_counter()
        scores = score(
            self.twin, [self._score(request) for request in scored], batch_size=self.batch_size, progress=progress
        )
        seconds = (time.perf_counter() - begun) / max(sum(len(request.prompt) for request in scored), 1)
        answers = dict(zip(continued, completions, strict=True))
        after = dict(zip(scored, scores, strict=True))
        for request in requests:
            if not request.max_tokens:
                ids = list(request.prompt)
                found = after.get(request, Scored(torch.empty(0), greedy=True))
                log_probs = [0.0, *found.log_probs.tolist()]
                answers[request] = [Completion(ids, log_probs, seconds=seconds * len(ids), weights=found.weights)]
        return [answers[request] for request in requests]

    def _generate(self, request: Ask) -> Generate:
        return Generate(
            prompt=request.prompt,
            max_new_tokens=request.max_tokens,
            decoding=Sampling(request.temperature, request.top_p, request.stop, request.top_k),
            completions=request.completions,
            seed=request.seed,
            likeliest=request.likeliest,
            task=self._task,
        )

    def _score(self, request: Ask) -> Score:
        """Return the request for a prompt's own log-probabilities. The first token has none, which counts as 0.

        No harness says where the context ends in such a prompt, so the router reads the whole prompt.
        """
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
            except Exception as error:  # it is raised in every waiting thread
                for _, future in waiting:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(waiting, answers, strict=True):
                if isinstance(answer, RefusedError):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)


def _silent(count: int) -> None:
    """Report nothing."""


_ENGINES: dict[tuple[str, str], Engine | str] = {}
"""The engines by twin and settings, and why there is none for a twin that could not be loaded."""
_LOADING = threading.Lock()


def hold(name: str, engine: Engine) -> None:
    """Make `engine(name, ...)` return an engine whose twin is in memory, for settings with the engine's batch size.

    `name` stands in place of a directory and begins with twin_merged/. Only the last engine is held: a leaderboard
    evaluates one after the other.
    """
    with _LOADING:
        for key in [key for key in _ENGINES if key[0].startswith("twin_merged/")]:
            del _ENGINES[key]
        _ENGINES[(name, TwinSettings(batch_size=engine.batch_size).model_dump_json())] = engine


def engine(directory: str, settings: TwinSettings) -> Engine:
    """Return the process's engine for a twin and its settings. The first thread that asks loads the twin.

    A twin that can't be loaded is not tried again in this process.

    Args:
        directory: the twin's directory, or the name of a twin in memory.
        settings: how it runs.

    Raises:
        InputError: a twin that can't be loaded or does not generate text.
    """
    key = (directory, settings.model_dump_json())
    with _LOADING:
        if key not in _ENGINES:
            try:
                _ENGINES[key] = _loaded(directory, settings)
            except InputError as error:
                _ENGINES[key] = str(error)
            except Exception as error:
                _log.exception("%s can't be loaded", directory)
                _ENGINES[key] = f"{directory}: can't be loaded ({first_line(error)})"
        found = _ENGINES[key]
    if isinstance(found, str):
        raise InputError(found)
    return found


def _loaded(directory: str, settings: TwinSettings) -> Engine:
    twin = TwinModel.from_pretrained(
        directory,
        device=settings.device or AUTO,
        device_map=settings.device_map,
        max_memory=settings.max_memory,
        offload_folder=settings.offload_folder,
        quantization=settings.quantization,
        dtype=settings.dtype,
        protocol=settings.protocol,
        tolerance=settings.tolerance,
    )
    if not isinstance(twin, TwinCausalLM):
        raise InputError(f"{directory}: {NOT_CAUSAL[twin.task_type]}, which is what is asked for here")
    twin.compiling = settings.compile
    return Engine(twin, settings.batch_size)
