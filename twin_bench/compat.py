"""What depends on the version of transformers or peft: the one place for it.

A fast path that a model or a version does not allow is left off, and said once.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

__all__ = ["Conv1D", "cache_argument", "pattern_of", "prefix_argument", "say_once", "selects_logits"]

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""transformers 5.24 renamed the second to the first: its signatures show the first, and it warns of the second."""

_log = logging.getLogger(__name__)


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the name under which a model's forward takes keys and values; None where it takes none."""
    takes = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in takes), None)


def prefix_argument(model: Any) -> str | None:
    """Return the name under which a language model and its backbone take the keys and values of a shared prefix.

    None where those can't be kept and given to several rows, as a state-space model's: it is said once.
    """
    name = cache_argument(model.base_model.forward)
    layers: Sequence[Any] = DynamicCache(config=model.config).layers
    stateful = getattr(model, "_is_stateful", False) or any(not hasattr(x, "batch_repeat_interleave") for x in layers)
    if name is not None and name == cache_argument(model.forward) and not stateful:
        return name
    why = "keeps a state that is no keys and values" if stateful else f"takes none of {', '.join(CACHE_ARGUMENTS)}"
    say_once(f"{_named(model)} {why}: what rows begin with alike is run for each of them")
    return None


def selects_logits(model: Any) -> bool:
    """Return whether a language model can leave out the logits that nobody asks for; where not, it is said once."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return True
    say_once(f"{_named(model)} takes no logits_to_keep: the logits of all tokens are computed, which takes memory")
    return False


def pattern_of(patterns: Sequence[str], module: str) -> str:
    """Return the pattern (of a LoRA config's rank_pattern or alpha_pattern) that a module has; else its own name."""
    from peft.utils.other import get_pattern_key

    found: str = get_pattern_key(list(patterns), module)
    return found


def _named(model: Any) -> str:
    return f"{type(model).__name__} (transformers {transformers.__version__})"


@functools.cache
def say_once(reason: str) -> None:
    """Warn, once a process for each reason, that a fast path is off."""
    _log.warning(reason)
