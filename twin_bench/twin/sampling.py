"""Decoding: how the tokens of a generated text are chosen, and what is read from transformers' `generate`.

A sampled text depends on its request's seed. It does not depend on the batch or on what was drawn before.
"""

from __future__ import annotations

import abc
import bisect
import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

HARMLESS_SETTINGS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
        *("temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("use_cache", "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config"),
    }
)
"""Settings of a generation config that leave the largest logit the next token, when nothing is sampled."""
HARMLESS_OPTIONS = frozenset({"logits_processor", "stopping_criteria"})
"""Options of `generate` that leave the largest processed logit the next token."""
NEUTRAL = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
"""Values with which a setting or an option changes nothing."""


@dataclass(frozen=True)
class Completion:
    """A generated text: its tokens, and each token's log-probability under the model's own distribution.

    `tokens` ends before the token that ended the text. That token is `end_token`, which is None for a text that ended
    otherwise. A text that is `stopped` ends with the token that completed a stop string. `log_probs` are natural
    logarithms, one for each token; the list is empty if nobody asked for them. `likeliest` are, for each token, the
    most probable tokens at its place with their log-probabilities, the most probable one first: as many as were asked
    for. `seconds` is the text's share of the time that its batch took, routing included. `weights` are its request's
    fusion weights, one for each expert.
    """

    tokens: list[int]
    log_probs: list[float]
    end_token: int | None = None
    stopped: bool = False
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)
    weights: tuple[float, ...] = field(default=(), compare=False)

    @property
    def finish_reason(self) -> Literal["stop", "length", "endoftext"]:
        """Why the text ended: at a stop string, at its largest length, or at an end token."""
        if self.end_token is not None:
            return "endoftext"
        return "stop" if self.stopped else "length"


class Decoding(abc.ABC):
    """How tokens are chosen. Requests with equal decodings can share a batch, so a decoding is hashable.

    `stop` are the strings at which a completion is cut. The cut is after the token that completes one.
    """

    stop: tuple[str, ...] = ()

    @abc.abstractmethod
    def options(self, tokenizer: Any, seeds: Sequence[str], length: int) -> dict[str, Any]:
        """Return the options of transformers' `generate` for one batch.

        Args:
            tokenizer: the model's tokenizer.
            seeds: each row's seed.
            length: the number of tokens of the prompts, padding included.
        """


@dataclass(frozen=True)
class Sampling(Decoding):
    """Draws from the tempered distribution, or takes the most probable token at temperature 0.

    `top_p` below 1 keeps the most probable tokens whose probabilities sum to it. `top_k` keeps that many of the most
    probable tokens, and 0 keeps all; it comes before `top_p`, as in transformers. `stop` are strings that end a text.
    They stay in the text. The prompt is no part of the text, so a stop string does not begin in it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_k: int = 0

    def options(self, tokenizer: Any, seeds: Sequence[str], length: int) -> dict[str, Any]:
        """Return the options of transformers' `generate` for one batch: greedy, over scores that the draws decide."""
        options: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,  # whatever the model's generation config says
            "logits_processor": self._processors(seeds),
        }
        if self.stop:
            options["stopping_criteria"] = StoppingCriteriaList([_AtStop(tokenizer, self.stop, length)])
        return options

    def _processors(self, seeds: Sequence[str]) -> LogitsProcessorList:
        if not self.temperature:
            return LogitsProcessorList()
        processors: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*processors, _Gumbel(seeds)])


class _Gumbel(LogitsProcessor):  # type: ignore[misc]
    """Draws a token for each row, from the row's own generator.

    The argmax of scores with Gumbel noise is a draw from their softmax (Maddison et al., 2014). The noise is made in
    float64 where the scores are: on a CUDA device, else on the CPU, as not every other device has float64. A seed draws
    the same on all devices of a kind. The CPU's generators and CUDA's differ.
    """

    def __init__(self, seeds: Sequence[str]) -> None:
        self._seeds = [int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1 for seed in seeds]
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) of 0 for the drawn tokens and -inf for all others."""
        device = scores.device if scores.device.type == "cuda" else torch.device("cpu")
        if not self._generators:
            self._generators = [torch.Generator(device).manual_seed(seed) for seed in self._seeds]
        uniform = torch.empty(scores.shape, dtype=torch.float64, device=device)
        for row, generator in zip(uniform, self._generators, strict=True):
            row.uniform_(generator=generator)
        noise = -torch.log(-torch.log(uniform.clamp_(min=1e-300)))
        drawn = (scores.to(device).double() + noise).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.to(scores.device), 0.0)


class _AtStop(StoppingCriteria):  # type: ignore[misc]
    """Ends each row whose new tokens hold a stop string. `length` is the number of tokens of the prompts."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], length: int) -> None:
        self._tokenizer, self._stop, self._length = tokenizer, stop, length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return which rows of `input_ids` (rows, length) end, (rows,) bool."""
        new = input_ids[:, self._length :].tolist()
        return torch.tensor([_holds(self._tokenizer, ids, self._stop) for ids in new], device=input_ids.device)


def stop_length(tokenizer: Any, ids: Sequence[int], stop: Collection[str]) -> int | None:
    """Return how many of a text's tokens it takes to complete the first stop string; None where it holds none.

    The text is one that ended there: what comes after is padding.
    """
    if not stop or not _holds(tokenizer, ids, stop):
        return None
    return bisect.bisect_left(range(len(ids)), True, lo=1, key=lambda count: _holds(tokenizer, ids[:count], stop))


def _holds(tokenizer: Any, ids: Sequence[int], stop: Collection[str]) -> bool:
    """Return whether a text holds a stop string.

    All of it is decoded. Its last tokens alone can decode otherwise: a character can take several tokens.
    """
    text = tokenizer.decode(list(ids))
    return any(string in text for string in stop)


def takes_largest(options: Mapping[str, Any], generation_config: Any) -> bool:
    """Return whether `generate` picks the token with the largest logit, after `options`' own logits processors.

    Args:
        options: options of transformers' `generate`.
        generation_config: the model's generation config. It may ask for a repetition penalty, suppressed tokens, ...
    """
    asked = {**generation_config.to_diff_dict(), **options}
    changed = {name for name, value in asked.items() if value is not None and value != NEUTRAL.get(name)}
    return changed <= HARMLESS_SETTINGS | HARMLESS_OPTIONS


def end_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: the generation config's and the tokenizer's."""
    configured = generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def picked(
    logits: Tensor,
    options: Mapping[str, Any],
    ends: Collection[int],
    tokenizer: Any,
    stop: Collection[str] = (),
    likeliest: int = 0,
) -> list[Completion]:
    """Return completions of one token, picked as `generate` would with these options.

    Args:
        logits: (rows, vocabulary) of the token after each prompt.
        options: options of `generate` that `takes_largest` allows.
        ends: the tokens that end a text.
        tokenizer: the model's tokenizer.
        stop: the strings that end a text.
        likeliest: the number of most probable tokens to return of each place.
    """
    scores = logits.float()
    unread: Any = torch.zeros(len(scores), 0, dtype=torch.long)  # stands for the prompts, which no processor here reads
    tokens = options.get("logits_processor", LogitsProcessorList())(unread, scores).argmax(dim=-1)
    found = zip(tokens.tolist(), *_told([scores], tokens[:, None], likeliest), strict=True)
    return [_cut([token], own, most, ends, tokenizer, stop) for token, own, most in found]


def completed(
    output: Any,
    length: int,
    ends: Collection[int],
    tokenizer: Any,
    stop: Collection[str] = (),
    likeliest: int = 0,
) -> list[Completion]:
    """Return the completions that `generate` found for a batch, each cut at its first end token or stop string.

    What fills a row that ended before its batch did comes after that cut.

    Args:
        output: what `generate` returned with `return_dict_in_generate`. Log-probabilities are read from its `logits`,
            where those were asked for.
        length: the number of tokens of the prompts, padding included.
        ends: the tokens that end a text.
        tokenizer: the model's tokenizer.
        stop: the strings that end a text.
        likeliest: the number of most probable tokens to return of each place.
    """
    new = output.sequences[:, length:]
    nothing: list[list[Any]] = [[] for _ in new]
    told = (nothing, nothing) if output.logits is None else _told(output.logits, new, likeliest)
    found = zip(new.tolist(), *told, strict=True)
    return [_cut(ids, own, most, ends, tokenizer, stop) for ids, own, most in found]


def _told(
    steps: Sequence[Tensor], tokens: Tensor, likeliest: int
) -> tuple[list[list[float]], list[list[list[tuple[int, float]]]]]:
    """Return, for each row and place, the log-probability of its token, and the most probable tokens with theirs.

    Args:
        steps: the logits of each place, (rows, vocabulary).
        tokens: (rows, places).
        likeliest: the number of most probable tokens.
    """
    chosen, best, values = [], [], []
    for place, logits in enumerate(steps):
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        chosen.append(log_probs.gather(1, tokens[:, place, None])[:, 0])
        most = log_probs.topk(min(likeliest, log_probs.shape[1]), dim=-1)
        best.append(most.indices)
        values.append(most.values)
    ids, their = torch.stack(best, dim=1).tolist(), torch.stack(values, dim=1).tolist()
    pairs = [[list(zip(*one, strict=True)) for one in zip(*row, strict=True)] for row in zip(ids, their, strict=True)]
    return torch.stack(chosen, dim=1).tolist(), pairs


def _cut(
    ids: list[int],
    log_probs: list[float],
    likeliest: list[list[tuple[int, float]]],
    ends: Collection[int],
    tokenizer: Any,
    stop: Collection[str],
) -> Completion:
    """Return the completion that new tokens begin with: up to the first stop string or before the first end token."""
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    stopped = stop_length(tokenizer, ids[:end], stop)
    if stopped is not None:
        return Completion(ids[:stopped], log_probs[:stopped], stopped=True, likeliest=likeliest[:stopped])
    return Completion(ids[:end], log_probs[:end], None if end is None else ids[end], likeliest=likeliest[:end])


def graded_by(logits: Tensor, continuation: Sequence[int]) -> Tensor:
    """Return a continuation's log-probabilities under the logits (tokens, vocabulary) that predict it.

    Behind them stands 1 if every token is the most probable one, and 0 otherwise: (tokens + 1,), on the device, whose
    caller reads the numbers of a whole batch at once.
    """
    asked = torch.tensor(list(continuation)).to(logits.device, non_blocking=True)
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits, dim=-1, dtype=exact).gather(1, asked[:, None])[:, 0]
    greedy = (logits.argmax(dim=-1) == asked).all()
    return torch.cat([log_probs, greedy[None].to(exact)])


Text = tuple[tuple[int, int], Completion]
"""A request's place in its list, the number of one of its completions, and that completion."""


def timed(found: Iterator[Sequence[Text]]) -> Iterator[Text]:
    """Yield the texts of batches. The time that a batch took is shared equally by its texts."""
    begun = time.perf_counter()
    for batch in found:
        share = (time.perf_counter() - begun) / len(batch)
        for place, completion in batch:
            yield place, replace(completion, seconds=share)
        begun = time.perf_counter()
