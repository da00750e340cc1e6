"""From the engine's completions to Inspect's output."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    TopLogprob,
)

from twin_bench.twin.sampling import Completion


def choice(
    tokenizer: Any, model: str, found: Completion, stop: Sequence[str], *, logprobs: bool, at_length: str
) -> ChatCompletionChoice:
    """Return a completion as one of Inspect's choices, cut before the first of the strings in `stop`.

    `model` is the model's name, `at_length` the stop reason of a completion that ended at its largest length.
    """
    text: str = tokenizer.decode(found.tokens, skip_special_tokens=True)
    end = min((place for place in map(text.find, stop) if place >= 0), default=len(text))
    kept = len(found.tokens) if end == len(text) else _tokens_within(tokenizer, found.tokens, end)
    return ChatCompletionChoice(
        message=ChatMessageAssistant(content=text[:end], model=model, source="generate"),
        stop_reason=at_length if found.finish_reason == "length" else "stop",
        logprobs=token_logprobs(tokenizer, found, slice(kept)) if logprobs else None,
    )


def _tokens_within(tokenizer: Any, ids: Sequence[int], end: int) -> int:
    """Return how many of a text's tokens lie wholly in its first `end` characters."""
    lengths = range(1, len(ids) + 1)
    return bisect.bisect_right(lengths, end, key=lambda n: len(tokenizer.decode(ids[:n], skip_special_tokens=True)))


def token_logprobs(tokenizer: Any, found: Completion, places: slice) -> Logprobs:
    """Return the log-probabilities of those tokens of a completion, and of the most probable ones beside each."""
    told = zip(found.tokens, found.log_probs, found.likeliest or [[]] * len(found.tokens), strict=True)
    return Logprobs(
        content=[
            Logprob(
                token=tokenizer.decode([token]),
                logprob=own,
                top_logprobs=[TopLogprob(token=tokenizer.decode([t]), logprob=p) for t, p in likeliest] or None,
            )
            for token, own, likeliest in list(told)[places]
        ]
    )


def output(model: str, choices: list[ChatCompletionChoice], prompt: int, found: Sequence[Completion]) -> ModelOutput:
    """Return Inspect's output of completions, of which each is a choice. `prompt` is the prompt's number of tokens.

    A token that ends a text counts as generated. The time is the completions' share of their batches'.
    """
    generated = sum(len(one.tokens) + (one.end_token is not None) for one in found)
    return ModelOutput(
        model=model,
        choices=choices,
        usage=ModelUsage(input_tokens=prompt, output_tokens=generated, total_tokens=prompt + generated),
        time=sum(one.seconds for one in found),
    )
