"""PEFT LoRA adapters, opened as full models: the base model's parameters plus the adapter's changes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
from twin_bench.checkpoints.finite import require_weights
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.compat import pattern_of
from twin_bench.errors import InputError
from twin_bench.files import read_json

if TYPE_CHECKING:
    from peft import LoraConfig

_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
"""The parts of a parameter's name that PEFT inserts."""


def open_expert(directory: Path, base: Checkpoint, skeleton: Skeleton, *, allow_pickle: bool = False) -> Checkpoint:
    """Open an expert: a full checkpoint, or a PEFT LoRA adapter of `base`.

    Raises InputError as `open_checkpoint` and `open_adapter` do.
    """
    if (directory / "adapter_config.json").is_file():
        return open_adapter(directory, base, skeleton, allow_pickle=allow_pickle)
    return open_checkpoint(directory, skeleton, allow_pickle=allow_pickle)


def open_adapter(directory: Path, base: Checkpoint, skeleton: Skeleton, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a PEFT LoRA adapter as the model W + scale * B A that it makes of `base`. Tensors are computed when read.

    Supported are rank and alpha patterns, rsLoRA, LoRA on embeddings and on Conv1D, trained biases and
    modules_to_save. The sum is computed and returned in float32, or in float64 for a float64 base.

    Raises:
        InputError: The adapter is not a plain low-rank difference (DoRA, lora_bias, another adapter type), adapts the
            head or a module that the base model lacks, lacks one of a pair's factors, or has a factor of the
            wrong shape.
    """
    config = _lora_config(directory)
    stored = stored_tensors(directory, "adapter_model", "adapter_model", allow_pickle=allow_pickle)
    contents = _contents(directory, stored, skeleton)
    _require_complete_pairs(directory, contents.pairs, skeleton)
    transposed = skeleton.transposed | skeleton.embeddings
    adapters = {
        name: LowRank(pair["A"], pair["B"], _scale(config, name, pair["A"]().shape[0]), name in transposed)
        for name, pair in contents.pairs.items()
    }
    backbone: dict[str, Callable[[], Tensor]] = {
        **{name: functools.partial(base.__getitem__, name) for name in skeleton.backbone},
        **contents.replaced,
        **{name: functools.partial(_adapted, directory, base, name, lora) for name, lora in adapters.items()},
    }
    return Checkpoint(str(directory), backbone, dict(sorted(contents.head.items())), adapters, contents.replaced)


class _Contents(NamedTuple):
    """The tensors of an adapter's file, by the parameter that they change.

    `pairs` holds the factors "A" and "B" of each adapted matrix, `replaced` the parameters that the adapter
    stores whole, `head` the tensors of the task head.
    """

    pairs: dict[str, dict[str, Callable[[], Tensor]]]
    replaced: dict[str, Callable[[], Tensor]]
    head: dict[str, Callable[[], Tensor]]


def _lora_config(directory: Path) -> LoraConfig:
    """Return an adapter's config. InputError unless the adapter is a plain LoRA adapter."""
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
    return config


def _contents(directory: Path, stored: Mapping[str, Callable[[], Tensor]], skeleton: Skeleton) -> _Contents:
    """Sort an adapter's stored tensors by what they change."""
    contents = _Contents({}, {}, {})
    for key, unchecked in stored.items():
        read = functools.partial(_finite, unchecked, key, directory)
        if ".original_module." in key:  # the base model's copy of a module in modules_to_save
            continue
        name = _WRAPPERS.sub(".", key.removeprefix("base_model.model."))
        module, marker, side = name.partition(".lora_")
        parameter = _known_name(f"{module}.weight" if marker else name, skeleton)
        if parameter is None:
            raise InputError(f"{directory}: {key} adapts a module that the base model does not have")
        if marker:
            contents.pairs.setdefault(parameter, {})[side.removesuffix(".weight").removeprefix("embedding_")] = read
        elif parameter in skeleton.head:
            contents.head[parameter] = read
        else:
            contents.replaced[parameter] = with_shape(read, skeleton.backbone[parameter], parameter, directory)
    return contents


def _require_complete_pairs(directory: Path, pairs: Mapping[str, Mapping[str, object]], skeleton: Skeleton) -> None:
    """Raise an InputError unless every adapted matrix has both factors and belongs to the backbone."""
    for parameter, pair in pairs.items():
        if parameter in skeleton.head:
            raise InputError(f"{directory}: LoRA on the head ({parameter}); save the head whole (modules_to_save)")
        if pair.keys() != {"A", "B"}:
            raise InputError(f"{directory}: {parameter} needs one lora_A and one lora_B, found {sorted(pair)}")


def _scale(config: LoraConfig, parameter: str, rank: int) -> float:
    """Return the factor of B A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(pattern_of(list(alphas), parameter.removesuffix(".weight")), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _finite(read: Callable[[], Tensor], key: str, directory: Path) -> Tensor:
    return require_weights(read(), key, str(directory))


def _adapted(directory: Path, base: Checkpoint, parameter: str, lora: LowRank) -> Tensor:
    """Return W + scale * B A in float32 or float64. InputError if B A has another shape than W."""
    weight, a, b = base[parameter], lora.A(), lora.B()
    exact = torch.promote_types(weight.dtype, torch.float32)
    delta = lora.oriented(b.to(exact) @ a.to(exact))
    if delta.shape != weight.shape:
        raise InputError(shape_message(directory, parameter, delta.shape, weight.shape))
    return weight.to(exact) + lora.scale * delta


def _known_name(name: str, skeleton: Skeleton) -> str | None:
    """Return the model's name of a parameter, which an adapter may store without the base model's prefix."""
    known = skeleton.backbone.keys() | skeleton.head
    return next((n for n in (name, skeleton.prefix + name) if n in known), None)
