"""What depends on the version of transformers or peft: the one place for it.

A fast path that a model or a version does not allow is left off, and said once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

__all__ = [
    "LOADS_UNTIED",
    "SINCE_5",
    "Conv1D",
    "cache_argument",
    "continues_caches",
    "first_position",
    "import_peft",
    "own_names",
    "pattern_of",
    "prefix_argument",
    "say_once",
    "selects_logits",
    "seq2seq_classes",
]

SINCE_5 = int(transformers.__version__.partition(".")[0]) >= 5
"""Whether there are device maps and compiled steps: 4.56 leaves no weights to the disk, and compiles many graphs."""
LOADS_UNTIED = SINCE_5
"""Whether transformers leaves tied parameters untied that a checkpoint stores with different values."""
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""transformers 5.24 renamed the second to the first: its signatures show the first, and it warns of the second."""
ROPE_OF_LENGTHS = {"longrope", "dynamic"}
"""Rotary embeddings whose frequencies depend on the length of the longest row of a forward."""

_log = logging.getLogger(__name__)


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the name under which a model's forward takes keys and values; None where it takes none."""
    takes = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in takes), None)


def prefix_argument(model: Any) -> str | None:
    """Return the name under which a language model and its backbone take the keys and values of a shared prefix.

    None where those can't be kept and given to several rows, as a state-space model's, or where a token's keys depend
    on more than the tokens before it: it is said once.
    """
    name = cache_argument(model.base_model.forward)
    layers: Sequence[Any] = DynamicCache(config=model.config).layers
    repeated = all(hasattr(x, "batch_repeat_interleave") and not hasattr(x, "conv_states") for x in layers)
    if getattr(model, "_is_stateful", False) or not repeated:
        why = "keeps a state that is no keys and values"
    elif first_position(model):
        why = "counts positions from its padding's, and generate counts them from 0"
    elif _rope_types(model.config) & ROPE_OF_LENGTHS:
        why = "has rotary embeddings that depend on the length of the whole input"
    elif name is not None and name == cache_argument(model.forward):
        return name
    else:
        why = f"takes none of {', '.join(CACHE_ARGUMENTS)}"
    say_once(f"{_named(model)} {why}: what rows begin with alike is run for each of them")
    return None


def first_position(model: Any) -> int:
    """Return the position of a row's first token: 0, or in RoBERTa's kind the one after the padding's.

    Such a model computes positions from its tokens where none are given. Its table of positions has a padding index.
    """
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    return next((table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), 0)


def _rope_types(config: Any) -> set[str]:
    """Return the kinds of a config's rotary embeddings. Some models have several, by the kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = [rope, *(one for one in rope.values() if isinstance(one, Mapping))]
    return {one.get("rope_type", one.get("type", "default")) for one in several}


def continues_caches(model: Any) -> bool:
    """Return whether `generate` can continue the keys and values of a shared prefix; where not, it is said once.

    The cache must hold all of a prefix's tokens, which that of a window of attention does not. A model that prepares a
    step's inputs in a way of its own may take a given cache for something else.
    """
    layers: Sequence[Any] = DynamicCache(config=model.config).layers
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        why = "prepares the inputs of generate in its own way"
    elif any(type(layer) is not DynamicLayer for layer in layers):
        why = "has a cache that does not hold all keys and values"
    else:
        return True
    say_once(f"{_named(model)} {why}: texts of several tokens are generated without shared prefixes")
    return False


def selects_logits(model: Any) -> bool:
    """Return whether a language model can leave out the logits that nobody asks for; where not, it is said once."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return True
    say_once(f"{_named(model)} takes no logits_to_keep: the logits of all tokens are computed, which takes memory")
    return False


def seq2seq_classes() -> set[str]:
    """Return the names of the encoder-decoders of texts that transformers knows, older names of theirs included."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as NAMES

    listed = [names if isinstance(names, tuple | list) else (names,) for names in NAMES.values()]
    return {"T5WithLMHeadModel", *(name for names in listed for name in names)}


def own_names(model: Any) -> Callable[[str], str]:
    """Return the function from the name under which a checkpoint stores a tensor to the model's own name for it.

    transformers renames tensors when it loads them: GPT-NeoX's embed_out is its lm_head from transformers 5 on.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return functools.partial(_substituted, patterns)
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    return functools.partial(_renamed, renamings)


def _substituted(patterns: Mapping[str, str], name: str) -> str:
    """Return the name after the first of the patterns that it matches."""
    renamed = (re.subn(pattern, replacement, name) for pattern, replacement in patterns.items())
    return next((found for found, count in renamed if count), name)


def _renamed(renamings: Sequence[Any], name: str) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def pattern_of(patterns: Sequence[str], module: str) -> str:
    """Return the pattern (of a LoRA config's rank_pattern or alpha_pattern) that a module has; else its own name."""
    import_peft()
    from peft.utils.other import get_pattern_key

    found: str = get_pattern_key(list(patterns), module)
    return found


def import_peft() -> None:
    """Import PEFT without what bitsandbytes says when it is imported. Each import of a name of PEFT's comes after this.

    PEFT imports bitsandbytes wherever it is installed. It warns of the speed of quantised weights, whether or not there
    are any.
    """
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        importlib.import_module("peft")
    finally:
        log.setLevel(level)


def _named(model: Any) -> str:
    return f"{type(model).__name__} (transformers {transformers.__version__})"


@functools.cache
def say_once(reason: str) -> None:
    """Warn, once a process for each reason, that a fast path is off."""
    _log.warning(reason)
