"""PEFT LoRA adapters, opened as the models that they make of their base."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from twin_bench.checkpoints.checkpoint import (
    Checkpoint,
    LowRank,
    open_checkpoint,
    shape_message,
    stored_tensors,
    with_shape,
)
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.compat import pattern_of
from twin_bench.errors import InputError
from twin_bench.files import read_json

_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
"""What PEFT puts into a parameter's name."""


def open_expert(directory: Path, base: Checkpoint, skeleton: Skeleton, *, allow_pickle: bool = False) -> Checkpoint:
    """Open an expert: a full checkpoint, or a PEFT LoRA adapter as a view on `base`."""
    if (directory / "adapter_config.json").is_file():
        return open_adapter(directory, base, skeleton, allow_pickle=allow_pickle)
    return open_checkpoint(directory, skeleton, allow_pickle=allow_pickle)


def open_adapter(directory: Path, base: Checkpoint, skeleton: Skeleton, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a PEFT LoRA adapter as the model it makes of `base`: W + scale * B A, one tensor at a time.

    Rank and alpha patterns, rsLoRA, LoRA on embeddings and on Conv1D, trained biases and modules_to_save
    are honoured; the sum is taken in float32 (float64 for a float64 base). What is no plain low-rank
    delta (DoRA, lora_bias, other adapter types) is an InputError that says so.
    """
    from peft import LoraConfig, PeftConfig

    read_json(directory / "adapter_config.json")
    config = PeftConfig.from_pretrained(str(directory))
    unsupported = [key for key in ("use_dora", "lora_bias") if getattr(config, key, False)]
    if not isinstance(config, LoraConfig) or unsupported:
        kind = unsupported[0] if unsupported else config.peft_type
        raise InputError(
            f"{directory}: a {kind} adapter is not a plain LoRA delta; merge it into a checkpoint with "
            "peft's merge_and_unload first"
        )
    stored = stored_tensors(directory, "adapter_model", "adapter_model", allow_pickle=allow_pickle)
    low_rank: dict[str, dict[str, Callable[[], Tensor]]] = {}
    replaced: dict[str, Callable[[], Tensor]] = {}
    head: dict[str, Callable[[], Tensor]] = {}
    for key, read in stored.items():
        if ".original_module." in key:  # the base's copy of a saved module
            continue
        name = _WRAPPERS.sub(".", key.removeprefix("base_model.model."))
        module, marker, side = name.partition(".lora_")
        parameter = _known_name(f"{module}.weight" if marker else name, skeleton)
        if parameter is None:
            raise InputError(f"{directory}: {key} adapts a module that the base model does not have")
        if marker:
            low_rank.setdefault(parameter, {})[side.removesuffix(".weight").removeprefix("embedding_")] = read
        elif parameter in skeleton.head:
            head[parameter] = read
        else:
            replaced[parameter] = with_shape(read, skeleton.backbone[parameter], parameter, directory)

    def scale_of(parameter: str, rank: int) -> float:
        alphas = config.alpha_pattern or {}
        module = parameter.removesuffix(".weight")
        alpha = alphas.get(pattern_of(list(alphas), module), config.lora_alpha)
        return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))

    def adapted(parameter: str, lora: LowRank) -> Tensor:
        weight, a, b = base[parameter], lora.A(), lora.B()
        exact = torch.promote_types(weight.dtype, torch.float32)
        delta = b.to(exact) @ a.to(exact)
        delta = delta.T if parameter in skeleton.transposed | skeleton.embeddings else delta
        if delta.shape != weight.shape:
            raise InputError(shape_message(directory, parameter, delta.shape, weight.shape))
        return weight.to(exact) + lora.scale * delta

    for parameter, factors in low_rank.items():
        if parameter in skeleton.head:
            raise InputError(f"{directory}: LoRA on the head ({parameter}); save the head whole (modules_to_save)")
        if factors.keys() != {"A", "B"}:
            raise InputError(f"{directory}: {parameter} needs one lora_A and one lora_B, found {sorted(factors)}")
    adapters = {
        name: LowRank(factors["A"], factors["B"], scale_of(name, factors["A"]().shape[0]))
        for name, factors in low_rank.items()
    }
    changed = {name: functools.partial(adapted, name, lora) for name, lora in adapters.items()}
    unchanged = {name: functools.partial(base.__getitem__, name) for name in skeleton.backbone}
    backbone: dict[str, Callable[[], Tensor]] = {**unchanged, **replaced, **changed}
    return Checkpoint(str(directory), backbone, dict(sorted(head.items())), adapters, replaced)


def _known_name(name: str, skeleton: Skeleton) -> str | None:
    known = skeleton.backbone.keys() | skeleton.head
    return next((n for n in (name, skeleton.prefix + name) if n in known), None)
