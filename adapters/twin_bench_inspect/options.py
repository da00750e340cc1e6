"""What of Inspect's generation options a twin honours, refuses, or can only warn about."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Annotated, Any

from inspect_ai.model import GenerateConfig
from pydantic import Field

from twin_bench.config import Settings, parse
from twin_bench.errors import InputError, shown

_BY_INSPECT = frozenset(
    {
        *("max_retries", "timeout", "attempt_timeout", "max_connections", "adaptive_connections", "system_message"),
        *("cache", "fail_on_refusal", "reasoning_history", "max_tool_output", "internal_tools", "parallel_tool_calls"),
    }
)
"""Options that Inspect handles before it asks a provider, and those of tools, which are refused themselves."""
_NEUTRAL: Mapping[str, Any] = {
    **{"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1},
    **{"response_schema": None, "extra_body": {}, "modalities": []},
}
"""Options that would change the answer and that the engine does not have, each with the value that changes nothing.

All others that are not in `Options` belong to a service on the network.
"""
_warn_once = functools.cache(logging.getLogger(__name__).warning)


class Options(Settings):
    """The options of one request: those of Inspect's GenerateConfig that a twin honours, under their names there."""

    max_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=0)
    stop_seqs: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: int | None = None
    num_choices: int = Field(default=1, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    prompt_logprobs: int = Field(default=0, ge=0, le=1)


def options(config: GenerateConfig, max_tokens: int) -> Options:
    """Return a request's options. Warn, once each, of those that have no effect on a twin.

    Args:
        config: what Inspect asks for.
        max_tokens: the largest number of tokens where `config` has none.

    Raises:
        InputError: an option that a twin can't honour, or a value that is out of range.
    """
    given: dict[str, Any] = {"max_tokens": max_tokens, **config.model_dump(exclude_none=True)}
    for name, value in given.items():
        if name in _NEUTRAL and value != _NEUTRAL[name]:
            raise InputError(f"{name} {shown(value)}: a twin has no such option; leave {name} out")
        if name not in Options.model_fields and name not in _NEUTRAL and name not in _BY_INSPECT:
            _warn_once(f"twin_merged: {name} has no effect on a twin, which runs in this process")
    return parse(Options, {name: value for name, value in given.items() if name in Options.model_fields}, "twin_merged")
