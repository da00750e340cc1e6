"""Rehearsals: the costliest batch of a request list, run once before the list, to find out whether it fits.

A rehearsal runs the batch in each of the ways that the list may be run in: with fused weights, so that the fused copy
of the model is in memory, and on the low-rank path. It raises what torch raises if the memory does not suffice. It
returns the number of rows of its largest batch: a plan's memory may hold fewer than it was asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.encoded import tokens
from twin_bench.twin.language import TwinLanguageModel
from twin_bench.twin.memory import ONE_FORWARD, Use
from twin_bench.twin.plan import Group
from twin_bench.twin.prefix import WORTHWHILE_TOKENS, Sharing, first_of
from twin_bench.twin.requests import Score
from twin_bench.twin.seq2seq import TwinSeq2Seq


@torch.no_grad()
def rehearse_score(twin: TwinCausalLM, requests: Sequence[Score], rows: int, *, max_length: int | None = None) -> int:
    """Run one batch of log-likelihoods, for the logits that its requests ask for.

    Args:
        twin: the twin.
        requests: the longest requests, at least one.
        rows: the number of rows in the batch. If there are fewer requests, they are repeated.
        max_length: the number of tokens of an input; by default the twin's.
    """
    batch = list(itertools.islice(itertools.cycle(requests), rows))
    inputs = [request.tokens(max_length or twin.max_length) for request in batch]
    starts = [len(ids) - len(request.continuation) for ids, request in zip(inputs, batch, strict=True)]
    asked = {place for ids, start in zip(inputs, starts, strict=True) for place in range(start, len(ids))}
    longest = max(map(len, inputs))
    weights, groups = _ways(twin, rows, longest, asked=len(asked))
    for group in groups:
        twin.logits(inputs[: len(group.rows)], sorted(asked), group, weights)
    shared = min(starts)
    budget = twin.budget()
    way = groups[0]
    affordable = budget is None or budget.shares(shared, longest - shared, len(asked), fused=way.weights is not None)
    if twin.shares_prefixes and shared >= WORTHWHILE_TOKENS and affordable:
        first = first_of(Sharing(way.rows, shared), budget, way.weights)
        prefix = twin.prefix(inputs[0][:shared], first, weights)
        rest = [ids[shared:] for ids in inputs[: len(way.rows)]]
        twin.logits(rest, sorted(place - shared for place in asked), way, weights, prefix)
    return _largest(groups)


@torch.no_grad()
def rehearse_generation(twin: TwinCausalLM, length: int, rows: int, *, compiled: bool = False) -> int:
    """Run one batch of texts whose prompts and completions have `length` tokens together, all but the last one.

    The keys and values of a whole text are in memory then. Where the list's steps are to be `compiled`, they lie in the
    cache of compiled steps, and no step is compiled.
    """
    prompt = tokens([0] * max(1, length - 1))
    weights, groups = _ways(twin, rows, length, Use(1, compiled=rows if compiled else 0))
    for group in groups:
        inputs = twin.collate([prompt] * len(group.rows), padding_side="left")
        try:
            twin.generate_batch(inputs, group, weights, max_new_tokens=1, do_sample=False, compiled=compiled)
        finally:
            twin.steps.forget()
    return _largest(groups)


@torch.no_grad()
def rehearse_targets(twin: TwinSeq2Seq, requests: Sequence[Score], rows: int, *, max_length: int | None = None) -> int:
    """Run one batch of log-likelihoods of an encoder-decoder. The arguments are those of `rehearse_score`.

    Every row gets a source of its own, because equal ones are encoded once.
    """
    batch = list(itertools.islice(itertools.cycle(requests), rows))
    window = max_length or twin.max_length
    sources = [[row % twin.model.config.vocab_size, *one.context[-window:][1:]] for row, one in enumerate(batch)]
    longest = max(len(own) + len(one.continuation) for own, one in zip(sources, batch, strict=True))
    weights, groups = _ways(twin, rows, longest, asked=max(len(one.continuation) for one in batch))
    for group in groups:
        own = batch[: len(group.rows)]
        twin.logits(sources[: len(own)], [one.continuation for one in own], group, weights)
    return _largest(groups)


@torch.no_grad()
def rehearse_texts(twin: TwinSeq2Seq, length: int, steps: int, rows: int) -> int:
    """Run one batch of texts of `steps` tokens that are generated from sources of `length`.

    The decoder reads a whole text at once, so that all its keys and values are in memory then.
    """
    weights, groups = _ways(twin, rows, length, Use(steps))
    for group in groups:
        inputs = twin.collate([tokens([0] * length)] * len(group.rows))
        texts = torch.zeros(len(group.rows), steps, dtype=torch.long, device=twin.device)
        with twin.fused(group, weights):
            read = {
                "encoder_hidden_states": twin.backbone(**inputs).last_hidden_state,
                "encoder_attention_mask": inputs["attention_mask"],
            }
            twin.model.get_decoder()(input_ids=texts, use_cache=True, **read)
    return _largest(groups)


def _largest(groups: Sequence[Group]) -> int:
    return max(len(group.rows) for group in groups)


def _ways(
    twin: TwinLanguageModel, rows: int, length: int, use: Use = ONE_FORWARD, *, asked: int = 1
) -> tuple[Tensor, list[Group]]:
    """Return fusion weights (rows, experts) that use all experts, and the groups that run a batch with them.

    A plan of these rows would have no larger batches, and no fused weights where their copy does not fit.

    Args:
        twin: the twin.
        rows: the number of rows.
        length: their length.
        use: what is done with them.
        asked: the number of positions whose logits are needed.
    """
    experts, budget = len(twin.expert_names), twin.budget(use)
    weights = torch.full((rows, experts), 1 / max(1, experts))
    most = [rows if budget is None else int(min(rows, budget.most(length, asked, fused=way))) for way in (True, False)]
    if budget is not None:
        budget.require(length, asked)
    fuses = most[0] and (twin.fusion.keeps_copies or not experts)
    fused = [Group(tuple(range(most[0])), weights[0])] if fuses else []
    by_row = Group(tuple(range(most[1])), None, budget is not None and budget.crowded(most[1], length, asked))
    return weights, [*fused, *([by_row] if most[1] and (experts or not fused) else [])]
