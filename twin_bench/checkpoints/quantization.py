"""Quantised weights: bitsandbytes' 4 and 8 bits, by transformers' own config."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, first_line, nearest, shown

Quantization = str | Mapping[str, Any]
"""`4bit` or `8bit`, or the keys of transformers' BitsAndBytesConfig."""
SHORT: Mapping[str, Mapping[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True},
}
"""What the short names stand for: NormalFloat4 of QLoRA (arXiv:2305.14314), and LLM.int8() (arXiv:2208.07339)."""


def quantization_config(asked: Quantization, dtype: torch.dtype | None = None) -> Any:
    """Return transformers' config of what a caller asks for.

    Args:
        asked: a short name, or the keys of BitsAndBytesConfig.
        dtype: what 4-bit weights are computed with where no key says it.

    Raises:
        InputError: an unknown name, key or value, or bitsandbytes is missing.
    """
    keys = SHORT.get(asked) if isinstance(asked, str) else asked
    if not isinstance(keys, Mapping) or not (keys.get("load_in_4bit") or keys.get("load_in_8bit")):
        raise InputError(
            f"quantization {shown(asked)}: known: {', '.join(SHORT)}, or keys of transformers' BitsAndBytesConfig, of "
            "which load_in_4bit or load_in_8bit is true"
        )
    known = inspect.signature(BitsAndBytesConfig.__init__).parameters.keys() - {"self", "kwargs"}
    for name in keys:
        if name not in known:
            raise InputError(f"quantization: unknown key {name!r}{nearest(name, known)}")
    require_bitsandbytes()
    compute = {"bnb_4bit_compute_dtype": dtype} if dtype is not None and keys.get("load_in_4bit") else {}
    try:
        return BitsAndBytesConfig(**{**compute, **keys})
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"quantization {shown(asked)}: {first_line(error)}; correct the key") from error


def config_keys(config: Any) -> str | None:
    """Return how the weights of a transformers config are quantised, as a text that tells two ways apart."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return str(sorted((stored if isinstance(stored, Mapping) else stored.to_dict()).items()))


def bits_of(config: Any) -> int | None:
    """Return the bits of quantised weights, 4 or 8, by their config or its keys; None for no config."""
    if config is None:
        return None
    keys = config if isinstance(config, Mapping) else config.to_dict()
    return 4 if keys.get("load_in_4bit") else 8


def require_bitsandbytes() -> None:
    """Raise an InputError if bitsandbytes is missing, which quantised weights are computed with."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("quantised weights need bitsandbytes: pip install 'twin-bench[quantized]'")


def require_quantisable(task_type: TaskType) -> None:
    """Raise an InputError for models that a twin does not keep quantised."""
    if task_type != "causal_lm":
        raise InputError(f"quantization: it is for causal language models, not {task_type}; leave it out")


def asked_of(folder: Path, config: Any, task_type: TaskType, asked: Quantization | None, dtype: Any) -> Any:
    """Return transformers' config with which a stored model is quantised as it is loaded, None where it is not.

    Args:
        folder: where the model is.
        config: its transformers config.
        task_type: what it serves.
        asked: how it is to be quantised, or None.
        dtype: what it is loaded in; None is its own dtype.

    Raises:
        InputError: it is quantised already, or can't be; or what `quantization_config` refuses.
    """
    stored = getattr(config, "quantization_config", None)
    if asked is None:
        if stored is not None:
            require_bitsandbytes()
        return None
    if stored is not None:
        raise InputError(f"{folder}: is quantised already; leave quantization out")
    require_quantisable(task_type)
    return quantization_config(asked, dtype or getattr(config, "dtype", None))
