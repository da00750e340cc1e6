"""Rehearsals: the costliest batch of a request list, run once before the list, to find out whether it fits.

A rehearsal runs the batch in each of the ways that the list may be run in: with fused weights, so that the fused copy
of the model is in memory, and on the low-rank path. It raises what torch raises if the memory does not suffice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from twin_bench.twin.causal import TwinCausalLM
from twin_bench.twin.encoded import tokens
from twin_bench.twin.language import TwinLanguageModel
from twin_bench.twin.plan import Group
from twin_bench.twin.prefix import WORTHWHILE_TOKENS
from twin_bench.twin.requests import Score
from twin_bench.twin.seq2seq import TwinSeq2Seq


@torch.no_grad()
def rehearse_score(twin: TwinCausalLM, requests: Sequence[Score], rows: int, *, max_length: int | None = None) -> None:
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
    weights, groups = _ways(twin, rows)
    for group in groups:
        twin.logits(inputs, sorted(asked), group, weights)
    shared = min(starts)
    if twin.shares_prefixes and shared >= WORTHWHILE_TOKENS:
        prefix = twin.prefix(inputs[0][:shared], groups[0], weights)
        rest = [ids[shared:] for ids in inputs]
        twin.logits(rest, sorted(place - shared for place in asked), groups[0], weights, prefix)


@torch.no_grad()
def rehearse_generation(twin: TwinCausalLM, length: int, rows: int) -> None:
    """Run one batch of texts whose prompts and completions have `length` tokens together, all but the last one.

    The keys and values of a whole text are in memory then.
    """
    inputs = twin.collate([tokens([0] * max(1, length - 1))] * rows, padding_side="left")
    weights, groups = _ways(twin, rows)
    for group in groups:
        twin.generate_batch(inputs, group, weights, max_new_tokens=1, do_sample=False)


@torch.no_grad()
def rehearse_targets(twin: TwinSeq2Seq, requests: Sequence[Score], rows: int, *, max_length: int | None = None) -> None:
    """Run one batch of log-likelihoods of an encoder-decoder. The arguments are those of `rehearse_score`.

    Every row gets a source of its own, because equal ones are encoded once.
    """
    batch = list(itertools.islice(itertools.cycle(requests), rows))
    window = max_length or twin.max_length
    sources = [[row % twin.model.config.vocab_size, *one.context[-window:][1:]] for row, one in enumerate(batch)]
    weights, groups = _ways(twin, rows)
    for group in groups:
        twin.logits(sources, [one.continuation for one in batch], group, weights)


@torch.no_grad()
def rehearse_texts(twin: TwinSeq2Seq, length: int, steps: int, rows: int) -> None:
    """Run one batch of texts of `steps` tokens that are generated from sources of `length`.

    The decoder reads a whole text at once, so that all its keys and values are in memory then.
    """
    inputs = twin.collate([tokens([0] * length)] * rows)
    texts = torch.zeros(rows, steps, dtype=torch.long, device=twin.device)
    weights, groups = _ways(twin, rows)
    for group in groups:
        with twin.fused(group, weights):
            read = {
                "encoder_hidden_states": twin.backbone(**inputs).last_hidden_state,
                "encoder_attention_mask": inputs["attention_mask"],
            }
            twin.model.get_decoder()(input_ids=texts, use_cache=True, **read)


def _ways(twin: TwinLanguageModel, rows: int) -> tuple[Tensor, list[Group]]:
    """Return fusion weights (rows, experts) that use all experts, and the groups that run a batch with them."""
    experts = len(twin.expert_names)
    weights = torch.full((rows, experts), 1 / max(1, experts))
    every = tuple(range(rows))
    fused = [Group(every, weights[0])] if twin.fusion.keeps_copies or not experts else []
    return weights, [*fused, *([Group(every, None)] if experts else [])]
