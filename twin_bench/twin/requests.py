"""The scheduler: it answers lists of requests to a language model's twin.

`score` and `generate` take a list as a whole. They route each distinct context once, group the requests by fusion
weights, run what requests of a group begin with once, run the batches, and return the answers in the order of the
requests. No answer depends on the other requests, on their order, or on the batch size.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.twin.arguments import checked_length, checked_run, require_count
from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.compiled import filled
from twin_bench.twin.encoded import last_tokens, packed, tokens
from twin_bench.twin.language import TwinLanguageModel
from twin_bench.twin.memory import ONE_FORWARD, Use
from twin_bench.twin.model import TwinModel
from twin_bench.twin.sampling import (
    Completion,
    Decoding,
    Sampling,
    Text,
    completed,
    end_tokens,
    graded_by,
    picked,
    takes_largest,
    timed,
)

Progress = Callable[[int], None]
"""It is called with the number of steps since the last call. Each request takes two: it is routed, and answered."""


@dataclass(frozen=True)
class Score:
    """A request for log p(continuation | context), token by token.

    `routed_on` are the tokens that the router reads; None means the context. `task` is the request's true task, which
    is needed only where the twin's routing is `task`.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    routed_on: Sequence[int] | None = None
    task: str | None = None

    def tokens(self, window: int) -> Sequence[int]:
        """Return the tokens whose logits score the continuation: all but its last one, `window` at most."""
        return array("I", [*self.context, *self.continuation][-window - 1 : -1])


class Scored(NamedTuple):
    """The answer to a `Score`.

    `log_probs` are the natural logarithms of the continuation's token probabilities, (tokens,) on the CPU: float32, or
    float64 where the model is. `greedy` says whether every token is the most probable one. `weights` are the request's
    fusion weights, one for each expert.
    """

    log_probs: Tensor
    greedy: bool
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Generate:
    """A request for texts that continue a prompt.

    `completions` texts are generated, of at most `max_new_tokens` tokens each. `decoding` chooses their tokens. Text
    number n is drawn from the seed "`seed`/n". `likeliest` is how many of the most probable tokens are returned of each
    place, with their log-probabilities. `task` is the request's true task, which is needed only where the twin's
    routing is `task`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    decoding: Decoding = field(default_factory=Sampling)
    completions: int = 1
    seed: str = ""
    likeliest: int = 0
    task: str | None = None


@torch.no_grad()
def score(
    twin: TwinCausalLM,
    requests: Sequence[Score],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    fusion_weights: Tensor | None = None,
    progress: Progress | None = None,
) -> list[Scored]:
    """Return the answer to each request, in order. Requests with equal inputs and weights share one forward.

    Args:
        twin: the twin that answers.
        requests: the requests.
        batch_size: the largest number of rows in a forward.
        max_length: the number of tokens of an input; by default the twin's. Of a longer input the last are kept.
        fusion_weights: (requests, experts), used in place of the router's.
        progress: reports routed and answered requests.

    Raises:
        InputError: an empty context or continuation, a continuation over `max_length`, a token outside the vocabulary,
            or a missing task.
    """
    batch_size, window = checked_run(requests, batch_size, max_length, twin)
    if not requests:
        return []
    contexts = [check_score(twin, request, window) for request in requests]
    inputs = [request.tokens(window) for request in requests]
    asked = [len(request.continuation) for request in requests]
    twin.require_room([*map(len, inputs)], asked)
    weights = routed(twin, contexts, requests, fusion_weights, batch_size, progress)
    used = [tuple(row) for row in weights.tolist()]
    askers = _same(inputs, used)
    # A prefix ends before the first position whose logits some request needs.
    starts = {row: len(inputs[row]) - max(asked[asker] for asker in own) for row, own in askers.items()}
    scores: dict[int, Scored] = {}
    for batch, prefix in twin.prefixed(weights, inputs, starts, batch_size):
        kept = sorted({position for row in batch.rows for position in range(starts[row], len(inputs[row]))})
        rest = [inputs[row][prefix.length :] for row in batch.rows]
        logits = twin.logits(rest, [position - prefix.length for position in kept], batch, weights, prefix)
        place = {position: index for index, position in enumerate(kept)}
        graded: dict[int, Tensor] = {}
        for row, row_logits in zip(batch.rows, logits, strict=True):
            length = len(inputs[row])
            for asker in askers[row]:
                at = slice(place[length - asked[asker]], place[length - 1] + 1)
                graded[asker] = graded_by(row_logits[at], requests[asker].continuation)
        scores |= scored(graded, used)
        if progress:
            progress(len(graded))
    return [scores[row] for row in range(len(requests))]


@torch.no_grad()
def generate(
    twin: TwinCausalLM,
    requests: Sequence[Generate],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    fusion_weights: Tensor | None = None,
    log_probs: bool = True,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Return the completions of each request, in order. Requests with equal decodings and lengths share batches.

    Args:
        twin: the twin that answers.
        requests: the requests.
        batch_size: the largest number of rows in a forward. Each completion is a row.
        max_length: the number of tokens of a prompt and its completion; by default the twin's.
        fusion_weights: (requests, experts), used in place of the router's.
        log_probs: whether to return log-probabilities. Without them no logits are kept, which saves memory.
        progress: reports routed and answered requests.

    Raises:
        InputError: a request that `check_generate` refuses, or a missing task.
    """
    batch_size, window = checked_run(requests, batch_size, max_length, twin)
    if not requests:
        return []
    for request in requests:
        check_generate(twin, request, window)
    require_texts(twin, requests, batch_size, log_probs=log_probs)
    begun = time.perf_counter()
    prompts = [last_tokens(request.prompt, window) for request in requests]
    weights = routed(twin, prompts, requests, fusion_weights, batch_size, progress)
    routing = (time.perf_counter() - begun) / sum(request.completions for request in requests)
    used = [tuple(row) for row in weights.tolist()]
    answers: list[dict[int, Completion]] = [{} for _ in requests]
    for rows in _kinds(requests).values():
        found = (
            _one_token_each(twin, requests, rows, weights, batch_size)
            if not _use(twin, requests, rows, batch_size, log_probs).steps
            else _texts(twin, requests, rows, weights, batch_size, log_probs)
        )
        for (row, number), completion in timed(found):
            answers[row][number] = replace(completion, seconds=completion.seconds + routing, weights=used[row])
            if progress and len(answers[row]) == requests[row].completions:
                progress(1)
    return [[own[number] for number in range(len(own))] for own in answers]


def require_texts(twin: TwinCausalLM, requests: Sequence[Generate], batch_size: int, *, log_probs: bool = True) -> None:
    """Raise an InputError unless each request's text fits into memory alone. The arguments are those of `generate`."""
    for rows in _kinds(requests).values():
        use = _use(twin, requests, rows, batch_size, log_probs)
        twin.require_room([len(requests[row].prompt) for row in rows], use=use)


def _kinds(requests: Sequence[Generate]) -> dict[tuple[int, Decoding, int], list[int]]:
    """Return the requests that can share batches: by length, decoding and number of likeliest tokens."""
    kinds: dict[tuple[int, Decoding, int], list[int]] = {}
    for row, request in enumerate(requests):
        kinds.setdefault((request.max_new_tokens, request.decoding, request.likeliest), []).append(row)
    return kinds


def _use(
    twin: TwinCausalLM, requests: Sequence[Generate], rows: Sequence[int], batch_size: int, log_probs: bool
) -> Use:
    """Return what the batches of one kind have in common."""
    first = requests[rows[0]]
    steps, options = first.max_new_tokens, first.decoding.options(twin.tokenizer, [""], 1)
    if steps == 1 and takes_largest(options, twin.model.generation_config):
        return ONE_FORWARD
    compiled = twin.compiles(steps * -(-len(copies_of(requests, rows)) // batch_size)) * batch_size
    return Use(steps, log_probs or first.likeliest > 0, twin.sequences(options), compiled=compiled)


def _one_token_each(
    twin: TwinCausalLM, requests: Sequence[Generate], rows: Sequence[int], weights: Tensor, batch_size: int
) -> Iterator[list[Text]]:
    """Yield batches of some requests' completions of one token. They take one forward, so prompts can share prefixes.

    All `rows` have the same decoding. The completions of a request are drawn from the logits of one row.
    """
    prompts = [request.prompt for request in requests]
    decoding, likeliest = requests[rows[0]].decoding, requests[rows[0]].likeliest
    ends = end_tokens(twin.model.generation_config, twin.tokenizer)
    limits = {row: len(prompts[row]) - 1 for row in rows}
    for batch, prefix in twin.prefixed(weights, prompts, limits, batch_size):
        logits = twin.last_logits([prompts[row][prefix.length :] for row in batch.rows], batch, weights, prefix)
        copies = copies_of(requests, batch.rows)
        options = decoding.options(twin.tokenizer, [seed_of(requests, copy) for copy in copies], max(map(len, prompts)))
        place = {row: index for index, row in enumerate(batch.rows)}
        drawn = logits[[place[row] for row, _ in copies]]
        yield list(zip(copies, picked(drawn, options, ends, twin.tokenizer, decoding.stop, likeliest), strict=True))


def _texts(
    twin: TwinCausalLM,
    requests: Sequence[Generate],
    rows: Sequence[int],
    weights: Tensor,
    batch_size: int,
    log_probs: bool,
) -> Iterator[list[Text]]:
    """Yield batches of some requests' completions of several tokens. All `rows` have the same length and decoding.

    Prompts share prefixes where the model and the decoding allow it, and the steps are not compiled.
    """
    decoding, likeliest = requests[rows[0]].decoding, requests[rows[0]].likeliest
    copies = copies_of(requests, rows)
    prompts = [requests[row].prompt for row, _ in copies]
    own = weights[[row for row, _ in copies]]
    ends = end_tokens(twin.model.generation_config, twin.tokenizer)
    use = _use(twin, requests, rows, batch_size, log_probs)
    wanted = {"max_new_tokens": use.steps, "return_dict_in_generate": True, "output_logits": use.logits}
    shares = not use.compiled and twin.generates_after_prefixes(decoding.options(twin.tokenizer, [""], 1))
    limits = {place: len(ids) - 1 if shares else 0 for place, ids in enumerate(prompts)}
    try:
        for batch, prefix in twin.prefixed(own, prompts, limits, batch_size, use):
            real = len(batch.rows)
            batch = batch._replace(rows=filled(batch.rows, batch_size)) if use.compiled else batch
            asked = [copies[place] for place in batch.rows]
            inputs = twin.collate([tokens(prompts[place]) for place in batch.rows], padding_side="left")
            length = inputs["input_ids"].shape[1]
            options = decoding.options(twin.tokenizer, [seed_of(requests, copy) for copy in asked], length)
            how: Any = {"compiled": use.compiled > 0, "prefix": prefix}
            output = twin.generate_batch(inputs, batch, own, **how, **{**options, **wanted})
            found = completed(output, length, ends, twin.tokenizer, decoding.stop, likeliest)
            yield list(zip(asked[:real], found[:real], strict=True))
    finally:
        if use.compiled:
            twin.steps.forget()


def copies_of(requests: Sequence[Generate], rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return (row, number) of each completion of some requests."""
    return [(row, number) for row in rows for number in range(requests[row].completions)]


def seed_of(requests: Sequence[Generate], copy: tuple[int, int]) -> str:
    """Return the seed of the completion (row, number) of some requests."""
    row, number = copy
    return f"{requests[row].seed}/{number}"


def check_score(twin: TwinLanguageModel, request: Score, window: int) -> list[int]:
    """Return the tokens that the router reads. InputError for a request that `score` can't answer."""
    twin.check_tokens(request.context)
    twin.check_tokens(request.continuation, "continuation")
    if request.routed_on is not None:
        twin.check_tokens(request.routed_on)
    if len(request.continuation) > window:
        raise InputError(f"a continuation of {len(request.continuation)} tokens; the model's window is {window}")
    return last_tokens(request.context if request.routed_on is None else request.routed_on, window)


def check_generate(twin: TwinCausalLM, request: Generate, max_length: int | None = None) -> None:
    """Raise an InputError for a request that `generate` can't answer.

    That is an empty prompt, no token to generate, a prompt and completion over `max_length` (by default the twin's), or
    a token outside the vocabulary. So is a `max_length` over the model's window.
    """
    window = checked_length(max_length, twin)
    twin.check_tokens(request.prompt, "prompt")
    require_count(request.max_new_tokens, "max_new_tokens", least=0)
    require_count(request.completions, "completions", least=0)
    if request.max_new_tokens < 1 or request.completions < 1:
        raise InputError(
            f"{request.completions} completions of {request.max_new_tokens} tokens: ask for one of each at least"
        )
    if len(request.prompt) + request.max_new_tokens > window:
        raise InputError(
            f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} to generate; the model's window "
            f"is {window}"
        )


def routed(
    twin: TwinModel,
    contexts: Sequence[list[int]],
    requests: Sequence[Score] | Sequence[Generate],
    given: Tensor | None,
    batch_size: int,
    progress: Progress | None,
) -> Tensor:
    """Return the requests' fusion weights (requests, experts) on the CPU: the given ones, or those of the twin."""
    if given is not None:
        if progress:
            progress(len(contexts))
        return twin.checked_weights(given, len(contexts))
    tasks = [request.task for request in requests if request.task is not None]
    named = tasks if len(tasks) == len(requests) else None
    # Not `tokens`, whose copies and masks would take several times the memory of a long list's contexts.
    rows = [{"input_ids": ids} for ids in contexts]
    return twin.route_all(rows, named, batch_size=batch_size, progress=progress).cpu()


def _same(inputs: Sequence[Sequence[int]], weights: Sequence[tuple[float, ...]]) -> dict[int, list[int]]:
    """Return, for the first row with each combination of input and weights, all rows with that combination."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row, key in enumerate(weights):
        found.setdefault((packed(inputs[row]), key), []).append(row)
    return {rows[0]: rows for rows in found.values()}


def scored(graded: Mapping[int, Tensor], weights: Sequence[tuple[float, ...]]) -> dict[int, Scored]:
    """Return the scores of a batch's rows, by row. The device is asked once.

    Args:
        graded: what `graded_by` returns of each row.
        weights: all rows' fusion weights.
    """
    parts = torch.cat([*graded.values()]).cpu().split([len(own) for own in graded.values()])
    found = zip(graded, parts, strict=True)
    return {row: Scored(own[:-1].clone(), bool(own[-1]), weights[row]) for row, own in found}
