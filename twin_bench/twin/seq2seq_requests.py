"""The scheduler of encoder-decoders: it answers lists of requests to a TwinSeq2Seq.

`score` and `generate` take a list as a whole, as those of `twin_bench.twin.requests` do. The encoder reads a request's
context or prompt, and so does the router. The decoder scores the continuation, or generates the text. A batch's equal
contexts are encoded once. No answer depends on the other requests, on their order, or on the batch size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from twin_bench.twin.arguments import checked_length, checked_run, require_count
from twin_bench.twin.encoded import last_tokens, packed, tokens
from twin_bench.twin.memory import Use
from twin_bench.twin.plan import batches, plan
from twin_bench.twin.requests import (
    Generate,
    Progress,
    Score,
    Scored,
    check_score,
    copies_of,
    routed,
    scored,
    seed_of,
)
from twin_bench.twin.sampling import Completion, Decoding, Text, completed, end_tokens, graded_by, takes_largest, timed
from twin_bench.twin.seq2seq import START_TOKENS, TwinSeq2Seq


@torch.no_grad()
def score(
    twin: TwinSeq2Seq,
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
        max_length: the number of tokens of a context; by default the twin's. Of a longer context the last are kept.
        fusion_weights: (requests, experts), used in place of the router's.
        progress: reports routed and answered requests.

    Raises:
        InputError: an empty context or continuation, a continuation over `max_length`, a token outside the vocabulary,
            or a missing task.
    """
    batch_size, window = checked_run(requests, batch_size, max_length, twin)
    if not requests:
        return []
    sources = [last_tokens(request.context, window) for request in requests]
    targets = [list(request.continuation) for request in requests]
    contexts = [check_score(twin, request, window) for request in requests]
    twin.require_room([len(a) + len(b) for a, b in zip(sources, targets, strict=True)], [*map(len, targets)])
    weights = routed(twin, contexts, requests, fusion_weights, batch_size, progress)
    names = [packed(ids) for ids in sources]
    askers: dict[tuple[object, ...], list[int]] = {}
    longest: dict[bytes, int] = {}
    used = [tuple(row) for row in weights.tolist()]
    for row, own in enumerate(used):
        askers.setdefault((names[row], packed(targets[row]), own), []).append(row)
        longest[names[row]] = max(longest.get(names[row], 0), len(targets[row]))
    # Rows of one context have the same length here, so that they come into the same batches.
    lengths = [len(ids) + longest[name] for ids, name in zip(sources, names, strict=True)]
    same = {rows[0]: rows for rows in askers.values()}
    scores: dict[int, Scored] = {}
    asked = {row: len(targets[row]) for row in same}
    for batch in twin.planned(weights, lengths, batch_size, sorted(same), asked=asked):
        own_targets = [targets[row] for row in batch.rows]
        logits = twin.logits([sources[row] for row in batch.rows], own_targets, batch, weights)
        found = zip(batch.rows, own_targets, logits, strict=True)
        graded = {row: graded_by(row_logits[: len(target)], target) for row, target, row_logits in found}
        for row, answer in scored(graded, used).items():
            scores |= dict.fromkeys(same[row], answer)
            if progress:
                progress(len(same[row]))
    return [scores[row] for row in range(len(requests))]


@torch.no_grad()
def generate(
    twin: TwinSeq2Seq,
    requests: Sequence[Generate],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    fusion_weights: Tensor | None = None,
    log_probs: bool = True,
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Return the completions of each request, in order. Requests with equal decodings share batches.

    They share them whatever their lengths, if every token is the one with the largest logit: a text's first tokens do
    not depend on how long it may become. With beams, or if a generation config asks for a last token, they do.

    Args:
        twin: the twin that answers.
        requests: the requests.
        batch_size: the largest number of rows in a forward. Each completion is a row.
        max_length: the number of tokens of a prompt; by default the twin's. Of a longer prompt the last are kept.
        fusion_weights: (requests, experts), used in place of the router's.
        log_probs: whether to return log-probabilities. Without them no logits are kept, which saves memory.
        progress: reports routed and answered requests.

    Raises:
        InputError: a request that `check_generate` refuses, a text that does not fit into memory, or a missing task.
    """
    batch_size, window = checked_run(requests, batch_size, max_length, twin)
    if not requests:
        return []
    for request in requests:
        check_generate(twin, request, window)
    sources = [last_tokens(request.prompt, window) for request in requests]
    kinds = _kinds(twin, requests)
    for rows in kinds:
        twin.require_room([len(sources[row]) for row in rows], use=_use(twin, requests, rows, log_probs))
    begun = time.perf_counter()
    weights = routed(twin, sources, requests, fusion_weights, batch_size, progress)
    routing = (time.perf_counter() - begun) / sum(request.completions for request in requests)
    used = [tuple(row) for row in weights.tolist()]
    answers: list[dict[int, Completion]] = [{} for _ in requests]
    for rows in kinds:
        for (row, number), completion in timed(_texts(twin, requests, rows, sources, weights, batch_size, log_probs)):
            answers[row][number] = replace(completion, seconds=completion.seconds + routing, weights=used[row])
            if progress and len(answers[row]) == requests[row].completions:
                progress(1)
    return [[own[number] for number in range(len(own))] for own in answers]


def check_generate(twin: TwinSeq2Seq, request: Generate, max_length: int | None = None) -> None:
    """Raise an InputError for a request that `generate` can't answer.

    That is an empty prompt, no token to generate, more tokens than the decoder has positions, or a token outside the
    vocabulary. So is a `max_length` over the model's window.
    """
    checked_length(max_length, twin)
    twin.check_tokens(request.prompt, "prompt")
    require_count(request.max_new_tokens, "max_new_tokens")
    require_count(request.completions, "completions")
    twin.check_text(request.max_new_tokens)


def _kinds(twin: TwinSeq2Seq, requests: Sequence[Generate]) -> list[list[int]]:
    """Return the requests that can share batches: by decoding, likeliest tokens and, where it matters, length."""
    kinds: dict[tuple[int, Decoding, int], list[int]] = {}
    for row, request in enumerate(requests):
        options = request.decoding.options(twin.tokenizer, [""], START_TOKENS)
        steps = 0 if takes_largest(options, twin.model.generation_config) else request.max_new_tokens
        kinds.setdefault((steps, request.decoding, request.likeliest), []).append(row)
    return list(kinds.values())


def _use(twin: TwinSeq2Seq, requests: Sequence[Generate], rows: Sequence[int], log_probs: bool) -> Use:
    """Return what the batches of one kind have in common."""
    first = requests[rows[0]]
    sequences = twin.sequences(first.decoding.options(twin.tokenizer, [""], START_TOKENS))
    return Use(max(requests[row].max_new_tokens for row in rows), log_probs or first.likeliest > 0, sequences)


def _texts(
    twin: TwinSeq2Seq,
    requests: Sequence[Generate],
    rows: Sequence[int],
    sources: Sequence[Sequence[int]],
    weights: Tensor,
    batch_size: int,
    log_probs: bool,
) -> Iterator[list[Text]]:
    """Yield batches of some requests' completions. All `rows` have the same decoding."""
    decoding, likeliest = requests[rows[0]].decoding, requests[rows[0]].likeliest
    copies = copies_of(requests, rows)
    own = weights[[row for row, _ in copies]]
    limits = [requests[row].max_new_tokens for row, _ in copies]
    lengths = [len(sources[row]) for row, _ in copies]
    ends = end_tokens(twin.model.generation_config, twin.tokenizer)
    use = _use(twin, requests, rows, log_probs)
    steps, budget = use.steps, twin.budget(use)
    for group in plan(own, lengths, twin.costs, steps=steps, batch_size=batch_size, budget=budget):
        for batch in batches(group, lengths, batch_size, twin.costs, steps=steps, budget=budget, weights=own):
            asked = [copies[place] for place in batch.rows]
            allowed = [limits[place] for place in batch.rows]
            inputs = twin.collate([tokens(sources[row]) for row, _ in asked])
            options = decoding.options(twin.tokenizer, [seed_of(requests, copy) for copy in asked], START_TOKENS)
            wanted = {
                "max_new_tokens": max(allowed),
                "return_dict_in_generate": True,
                "output_logits": log_probs or likeliest > 0,
            }
            output = twin.generate_batch(inputs, batch, own, **{**options, **wanted})
            found = completed(output, START_TOKENS, ends, twin.tokenizer, decoding.stop, likeliest)
            yield list(zip(asked, map(_shortened, found, allowed), strict=True))


def _shortened(found: Completion, limit: int) -> Completion:
    """Return a completion as it is if it may have `limit` tokens, its end token included: it was run for longer."""
    if len(found.tokens) + (found.end_token is not None) <= limit:
        return found
    own = found.tokens[:limit], found.log_probs[:limit]
    return Completion(*own, likeliest=found.likeliest[:limit])
