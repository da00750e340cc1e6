"""Decoding: how the tokens of a generated text are chosen, and what is read from transformers' `generate`.

A sampled text depends on its request's seed. It does not depend on the batch or on what was drawn before.
"""

from __future__ import annotations

import abc
import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
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

HARMLESS_SETTINGS = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("use_cache", "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config"),
    }
)
"""Settings of a generation config that leave the largest logit the next token, when nothing is sampled."""
HARMLESS_OPTIONS = frozenset({"do_sample", "logits_processor", "pad_token_id", "stopping_criteria", "use_cache"})
"""Options of `generate` that leave the largest processed logit the next token, unless `do_sample` is true."""


@dataclass(frozen=True)
class Completion:
    """A generated text: its tokens, and each token's log-probability under the model's own distribution.

    `tokens` ends before the token that ended the text. That token is `end_token`, which is None for a text that ended
    otherwise. `log_probs` are natural logarithms, one for each token; the list is empty if nobody asked for them.
    """

    tokens: list[int]
    log_probs: list[float]
    end_token: int | None = None


class Decoding(abc.ABC):
    """How tokens are chosen. Requests with equal decodings can share a batch, so a decoding is hashable."""

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

    `top_p` below 1 keeps the most probable tokens whose probabilities sum to it. `stop` are strings that end a text.
    They stay in the text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def options(self, tokenizer: Any, seeds: Sequence[str], length: int) -> dict[str, Any]:
        """Return the options of transformers' `generate` for one batch: greedy, over logits that carry the noise."""
        options: dict[str, Any] = {"do_sample": False, "logits_processor": self._processors(seeds)}
        if self.stop:
            options["stopping_criteria"] = StoppingCriteriaList([_stop_criterion(tokenizer, self.stop)])
        return options

    def _processors(self, seeds: Sequence[str]) -> LogitsProcessorList:
        if not self.temperature:
            return LogitsProcessorList()
        processors: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*processors, _Gumbel(seeds)])


class _Gumbel(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise, from one generator for each row. The argmax is then a draw from the softmax."""

    def __init__(self, seeds: Sequence[str]) -> None:
        self._generators = [
            torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1)
            for seed in seeds
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (rows, vocabulary) with noise, in float64."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._generators])
        noise = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores.double() + noise.to(scores.device)


@functools.lru_cache(maxsize=16)
def _stop_criterion(tokenizer: Any, stop: tuple[str, ...]) -> StopStringCriteria:
    """Return the criterion that ends a text at a stop string. Making one takes half a second, so it is kept."""
    return StopStringCriteria(tokenizer, list(stop))


def takes_largest(options: Mapping[str, Any], generation_config: Any) -> bool:
    """Return whether `generate` picks the token with the largest logit, after `options`' own logits processors.

    Args:
        options: options of transformers' `generate`.
        generation_config: the model's generation config. It may ask for a repetition penalty, suppressed tokens, ...
    """
    changed = {name for name, value in generation_config.to_diff_dict().items() if value is not None}
    if generation_config.repetition_penalty == 1.0:
        changed.discard("repetition_penalty")
    return changed <= HARMLESS_SETTINGS and options.keys() <= HARMLESS_OPTIONS and not options.get("do_sample")


def end_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: the generation config's and the tokenizer's."""
    configured = generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def picked(logits: Tensor, options: Mapping[str, Any], ends: Collection[int]) -> list[Completion]:
    """Return completions of one token, picked as `generate` would with these options.

    Args:
        logits: (rows, vocabulary) of the token after each prompt.
        options: options of `generate` that `takes_largest` allows.
        ends: the tokens that end a text.
    """
    scores = logits.float()
    unread: Any = torch.zeros(len(scores), 0, dtype=torch.long)  # stands for the prompts, which no processor here reads
    tokens = options.get("logits_processor", LogitsProcessorList())(unread, scores).argmax(dim=-1)
    log_probs = torch.log_softmax(scores, dim=-1).gather(1, tokens[:, None])[:, 0].tolist()
    return [
        Completion([], [], token) if token in ends else Completion([token], [log_prob])
        for token, log_prob in zip(tokens.tolist(), log_probs, strict=True)
    ]


def completed(output: Any, length: int, ends: Collection[int], padding: int | None) -> list[Completion]:
    """Return the completions that `generate` found for a batch, each cut at its first end token.

    Args:
        output: what `generate` returned with `return_dict_in_generate`. Log-probabilities are read from its `logits`,
            where those were asked for.
        length: the number of tokens of the prompts, padding included.
        ends: the tokens that end a text.
        padding: the token that fills rows which ended before the batch did.
    """
    new = output.sequences[:, length:]
    log_probs: list[list[float]] = [[] for _ in new]
    if output.logits is not None:
        steps = [
            torch.log_softmax(logits.float(), dim=-1).gather(1, new[:, place, None])[:, 0]
            for place, logits in enumerate(output.logits)
        ]
        log_probs = torch.stack(steps, dim=1).tolist()
    found: list[Completion] = []
    for ids, own in zip(new.tolist(), log_probs, strict=True):
        kept = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        end = ids[kept] if kept < len(ids) else None
        while kept and end is None and ids[kept - 1] == padding:
            kept -= 1
        found.append(Completion(ids[:kept], own[:kept], end))
    return found
