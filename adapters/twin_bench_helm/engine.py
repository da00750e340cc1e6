"""The engine: one twin a process, which answers what HELM's threads ask together.

A request's answer depends on the request alone: not on its batch (each row has its own fusion weights), not on
the number of threads, and a sampled one on the request's own seed and not on what was drawn before.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from twin_bench.errors import InputError
from twin_bench.twin.causal import TwinCausalLM, tokens
from twin_bench.twin.model import TwinModel
from twin_bench.twin.parts import PROTOCOLS, ProtocolName
from twin_bench.twin.plan import Group

GATHER_SECONDS = 0.01
"""How long the engine waits for another request before it answers those it has."""


@dataclass(frozen=True)
class Ask:
    """One request: prompt tokens and how to continue them.

    `max_tokens` 0 asks for the log-probabilities of the prompt's own tokens.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    completions: int
    stop: tuple[str, ...]
    seed: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """What requests must have in common to be generated together."""
        return (self.max_tokens, self.temperature, self.top_p, self.completions, self.stop)


@dataclass(frozen=True)
class Completion:
    """Generated tokens (or the prompt's) and their log-probabilities under the model's own distribution."""

    tokens: list[int]
    log_probs: list[float]


class Engine:
    """Answers lists of requests with one twin, and single requests of many threads in lists.

    `task` is that of all requests, where the twin's routing is `task`.
    """

    def __init__(self, twin: TwinCausalLM, batch_size: int, task: str | None = None) -> None:
        self.twin, self.batch_size, self._task = twin, batch_size, task
        self._waiting: queue.SimpleQueue[tuple[Ask, Future[list[Completion]]]] = queue.SimpleQueue()
        self._stops: dict[tuple[str, ...], StopStringCriteria] = {}
        self._lock, self._starting = threading.Lock(), threading.Lock()
        self._server: threading.Thread | None = None

    def ask(self, request: Ask) -> list[Completion]:
        """Return the completions of one request; what other threads ask at the same time shares its batches."""
        with self._starting:
            if self._server is None:
                self._server = threading.Thread(target=self._serve, name="twin-bench engine", daemon=True)
                self._server.start()
        future: Future[list[Completion]] = Future()
        self._waiting.put((request, future))
        return future.result()

    def answer(self, requests: Sequence[Ask]) -> list[list[Completion]]:
        """Return the completions of each request: routed together, grouped by weights, fused once a group.

        Raises InputError for a request that can't be answered.
        """
        with self._lock:
            answers: dict[int, list[Completion]] = {}
            kinds: dict[tuple[Any, ...], list[int]] = {}
            for row, request in enumerate(requests):
                kinds.setdefault(request.kind, []).append(row)
            for rows in kinds.values():
                asked = [requests[row] for row in rows]
                found = self._generated(asked) if asked[0].max_tokens else self._scored(asked)
                answers.update(zip(rows, found, strict=True))
            return [answers[row] for row in range(len(requests))]

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
            except InputError:  # one of them can't be answered: then each is asked for itself
                for request, future in waiting:
                    self._settle(request, future)
                continue
            except Exception as error:  # whatever else went wrong is every waiting thread's to raise
                for _, future in waiting:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(waiting, answers, strict=True):
                future.set_result(answer)

    def _settle(self, request: Ask, future: Future[list[Completion]]) -> None:
        try:
            future.set_result(self.answer([request])[0])
        except Exception as error:  # raised where the request was made
            future.set_exception(error)

    def _stopping(self, stop: tuple[str, ...]) -> StopStringCriteria:
        """Return what ends a generation at a stop sequence; looking through the vocabulary takes half a second."""
        if stop not in self._stops:
            self._stops[stop] = StopStringCriteria(self.twin.tokenizer, list(stop))
        return self._stops[stop]

    def _tasks(self, rows: int) -> list[str] | None:
        return None if self._task is None else [self._task] * rows

    def _scored(self, requests: Sequence[Ask]) -> list[list[Completion]]:
        """Return the prompts' own log-probabilities, the first token's as 0 (HELM's convention).

        HELM does not say where in such a prompt the context ends: it is routed on as a whole.
        """
        prompts = [request.prompt for request in requests]
        pairs = [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1]
        routed_on = [prompt for prompt in prompts if len(prompt) > 1]
        tasks = self._tasks(len(pairs))
        scores = iter(
            self.twin.log_likelihoods(pairs, routed_on=routed_on, tasks=tasks, batch_size=self.batch_size)
            if pairs
            else []
        )
        return [
            [Completion(list(prompt), [0.0, *(next(scores).log_probs.tolist() if len(prompt) > 1 else [])])]
            for prompt in prompts
        ]

    def _generated(self, requests: Sequence[Ask]) -> list[list[Completion]]:
        first = requests[0]
        window = self.twin.max_length
        for request in requests:
            if not request.prompt:
                raise InputError("an empty prompt: nothing to continue or to route on")
            if len(request.prompt) + first.max_tokens > window:
                raise InputError(
                    f"a prompt of {len(request.prompt)} tokens and {first.max_tokens} to generate; the model's window "
                    f"is {window}"
                )
        weights = self.twin.route_all(
            [tokens(r.prompt) for r in requests], self._tasks(len(requests)), batch_size=self.batch_size
        )
        prompts = [request.prompt for request in requests]
        # What prompts begin with is run once where one token is asked for. To generate more, rows are padded on the
        # left, which would be behind the prefix: and a window of attention counts the padding between.
        limits = {row: len(prompt) - 1 if first.max_tokens == 1 else 0 for row, prompt in enumerate(prompts)}
        answers: dict[int, list[Completion]] = {}
        for batch, prefix in self.twin.sharing(weights, prompts, limits, self.batch_size, steps=first.max_tokens):
            asked = [requests[row] for row in batch.rows]
            if first.max_tokens == 1:
                found = self._one_token(asked, self.twin.next_logits(prompts, weights, batch, prefix))
            else:
                found = self._batch(asked, weights[list(batch.rows)], batch)
            answers.update(zip(batch.rows, found, strict=True))
        return [answers[row] for row in range(len(requests))]

    def _one_token(self, requests: Sequence[Ask], logits: Tensor) -> list[list[Completion]]:
        """Return one token for every completion, of the logits (requests, vocabulary) that predict it."""
        copies = requests[0].completions
        rows = logits.float().repeat_interleave(copies, dim=0)
        seeds = [f"{request.seed}/{number}" for request in requests for number in range(copies)]
        unread: Any = torch.zeros(len(rows), 0, dtype=torch.long)  # the prompts, which no processor here looks at
        picked = _sampler(requests[0], seeds)(unread, rows).argmax(dim=-1)
        log_probs = torch.log_softmax(rows, dim=-1).gather(1, picked[:, None])[:, 0].tolist()
        ends = _end_tokens(self.twin.model.generation_config, self.twin.tokenizer)
        found = [
            Completion([], []) if token in ends else Completion([token], [log_prob])
            for token, log_prob in zip(picked.tolist(), log_probs, strict=True)
        ]
        return [found[start : start + copies] for start in range(0, len(found), copies)]

    @torch.no_grad()
    def _batch(self, requests: Sequence[Ask], weights: Tensor, batch: Group) -> list[list[Completion]]:
        """Generate one batch. Every completion is a row of its own, which draws from its own seed."""
        first, tokenizer = requests[0], self.twin.tokenizer
        rows = [(request, number) for request in requests for number in range(request.completions)]
        padded = tokenizer.pad(
            [dict(tokens(request.prompt)) for request, _ in rows], padding_side="left", return_tensors="pt"
        ).to(self.twin.device)
        ids = padded["input_ids"]
        options: dict[str, Any] = {}
        if first.stop:
            options["stopping_criteria"] = StoppingCriteriaList([self._stopping(first.stop)])
        keys = weights.repeat_interleave(first.completions, dim=0)
        with self.twin.fused(Group(tuple(range(len(rows))), batch.weights), keys):
            out: Any = self.twin.model.generate(
                input_ids=ids,
                attention_mask=padded["attention_mask"],
                max_new_tokens=first.max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=_sampler(first, [f"{request.seed}/{number}" for request, number in rows]),
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
        new = out.sequences[:, ids.shape[1] :]
        ends = _end_tokens(self.twin.model.generation_config, tokenizer)
        found: list[Completion] = []
        for row, ids in enumerate(new.tolist()):
            length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            kept = ids[:length]
            log_probs = [
                float(torch.log_softmax(out.logits[place][row].float(), dim=-1)[token])
                for place, token in enumerate(kept)
            ]
            found.append(Completion(kept, log_probs))
        each = iter(found)
        return [[next(each) for _ in range(request.completions)] for request in requests]


def _sampler(kind: Ask, seeds: Sequence[str]) -> LogitsProcessorList:
    """Return what makes the largest logit a draw from the tempered distribution; nothing at temperature 0."""
    if not kind.temperature:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(kind.temperature)]
    if kind.top_p < 1:
        processors.append(TopPLogitsWarper(kind.top_p))
    return LogitsProcessorList([*processors, _Gumbel(seeds)])


class _Gumbel(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise from a generator a row: the argmax is then a draw from the softmax (Gumbel-max)."""

    def __init__(self, seeds: Sequence[str]) -> None:
        self._generators = [
            torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1)
            for seed in seeds
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (rows, vocabulary) with noise."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._generators])
        noise = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores.double() + noise.to(scores.device)


def _end_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    configured = generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


_ENGINES: dict[tuple[str, str | None, str | None, str, float | None, int], Engine] = {}
_LOADING = threading.Lock()


def hold(name: str, twin: TwinCausalLM, batch_size: int, task: str) -> None:
    """Have `engine` return, for `name` in place of a directory, an engine of a twin that is in memory already.

    `task` is that of all requests. It takes the place of the one held before: a leaderboard's twins come one after
    the other.
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
    """Return the process' one engine for a twin and its settings, loaded by whichever thread comes first.

    Raises InputError for what is wrong with the twin.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    key = (directory, device, dtype, protocol, tolerance, batch_size)
    with _LOADING:
        if key not in _ENGINES:
            chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
            twin = TwinModel.from_pretrained(
                directory, device=chosen, dtype=dtype, protocol=protocol, tolerance=tolerance
            )
            if not isinstance(twin, TwinCausalLM):
                raise InputError(f"{directory}: a classifier twin does not generate text; HELM asks for text")
            _ENGINES[key] = Engine(twin, batch_size)
        return _ENGINES[key]
