"""The arguments of HFLM that a language model's twin takes, and why it refuses the others."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from twin_bench.errors import InputError, nearest
from twin_bench.protocols import PROTOCOLS
from twin_bench.twin.compiled import COMPILING
from twin_bench_lm_eval.base import positive, require_one_of

_REASONS: Mapping[str, Collection[str]] = {
    "a twin's shared expert is the checkpoint in its directory": (
        *("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "revision", "subfolder", "tokenizer"),
        *("variant", "config", "state_dict", "key_mapping", "ignore_mismatched_sizes"),
    ),
    "a twin is quantised by its own argument, quantization=4bit or 8bit": (
        *("quantization_config", "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type"),
        *("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
    ),
    (
        "tensor parallelism splits the matrices that a twin's layers add to; parallelize=True places whole layers on "
        "several devices, and accelerate launch runs a whole twin on each"
    ): ("tp_plan", "tp_size", "device_mesh", "distributed_config"),
    "what a twin adds to an offloaded layer stays on a device": ("offload_buffers",),
    "kernels and fused modules read weights that a twin's layers replace": (
        *("use_kernels", "kernel_config", "allow_all_kernels", "fusion_config"),
    ),
    "a twin has the precision `dtype`": ("mixed_precision_dtype", "torch_dtype"),
    "a twin's log-softmax is in float32": ("softmax_dtype",),
    "a twin's kind is in its twin.json": ("backend",),
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}
"""Arguments of HFLM and of transformers' `from_pretrained` that can't hold for a twin, and why."""
LOADING = frozenset(
    (
        *("attn_implementation", "experts_implementation", "generation_config", "low_cpu_mem_usage", "use_safetensors"),
        *("weights_only", "disable_mmap", "local_files_only", "force_download", "cache_dir", "token", "proxies"),
        *("code_revision", "rope_scaling", "device_map"),
    )
)
"""Arguments of `from_pretrained` that HFLM passes on, and a twin too. Attributes of the model's config are others.

`rope_scaling` is transformers' older name of the attribute `rope_parameters`.
"""
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(HFLM.__init__).parameters.items()
    if name not in ("self", "kwargs")
}
_SAME: Mapping[str, Collection[Any]] = {"softmax_dtype": ("float32", torch.float32)}
"""Values of refused arguments that ask for what a twin does anyway."""


def checked(options: Mapping[str, Any], config: Any, own: Collection[str], backend: str) -> dict[str, Any]:
    """Return the options that HFLM is given, without those that change nothing.

    Args:
        options: HFLM's options by name, and those that it passes on to `from_pretrained`.
        config: the transformers config of the shared expert, whose attributes are options of `from_pretrained`.
        own: the names of the twin's own arguments, which may have been meant.
        backend: HFLM's name for the kind of twin.

    Raises:
        InputError: an option that can't hold for a twin, with the reason, or an unknown one.
    """
    attributes = {*config.to_dict(), *config.attribute_map}
    taken: dict[str, Any] = {}
    for name, value in options.items():
        if name in REFUSED:
            without_effect = (None, False, _DEFAULTS.get(name), *({**_SAME, "backend": (backend,)}.get(name, ())))
            if not any(value is one or value == one for one in without_effect):
                raise InputError(f"twin_merged: {name}={value}: {REFUSED[name]}; leave {name} out")
        elif name in _DEFAULTS or name in LOADING or name in attributes:
            taken[name] = value
        else:
            known = {*_DEFAULTS, *LOADING, *own} - REFUSED.keys()
            raise InputError(f"twin_merged: unknown argument {name!r}{nearest(name, known)}")
    return taken


def require_settings(*, fusion: str, protocol: str, compile: str, batch_size: Any) -> None:
    """Raise an InputError that names one of a language model's own arguments whose value is not a known one."""
    require_one_of("fusion", fusion, ("exact",))
    require_one_of("protocol", protocol, PROTOCOLS)
    require_one_of("compile", compile, COMPILING)
    if not str(batch_size).startswith("auto"):
        positive("batch_size", batch_size)


def loading(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options that HFLM does not know itself and passes on to `from_pretrained`."""
    return {name: value for name, value in options.items() if name not in _DEFAULTS}
