"""PEFT LoRA adapters, opened as full models: the base model's parameters plus the adapter's changes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from twin_bench.compat import import_peft, pattern_of
from twin_bench.errors import InputError, first_line
from twin_bench.files import read_json

if TYPE_CHECKING:
    from peft import LoraConfig

_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
"""The parts of a parameter's name that PEFT inserts."""
NOT_PLAIN = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"),
    *("target_parameters", "kasa_config", "monteclora_config", "arrow_config"),
)
"""The settings of a LoRA config with which an adapted layer computes something else than W x + scale * B A x."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""The beginnings of init_lora_weights with which PEFT takes the starting factors out of W when it loads an adapter."""


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
        InputError: The adapter is not a plain low-rank difference (DoRA, lora_bias, another adapter type, weights that
            start from the base model's own), adapts the head or a module that the base model lacks, lacks one of a
            pair's factors, or has a factor of another shape or rank than the base model and its config have.
    """
    config = _lora_config(directory)
    stored = stored_tensors(directory, "adapter_model", "adapter_model", allow_pickle=allow_pickle)
    contents = _contents(directory, stored, skeleton)
    _require_complete_pairs(directory, contents.pairs, skeleton)
    adapters = {name: _low_rank(directory, config, name, pair, skeleton) for name, pair in contents.pairs.items()}
    backbone: dict[str, Callable[[], Tensor]] = {
        **{name: functools.partial(base.__getitem__, name) for name in skeleton.backbone},
        **contents.replaced,
        **{name: functools.partial(_adapted, base, name, lora) for name, lora in adapters.items()},
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
    import_peft()
    from peft import LoraConfig, PeftConfig

    file = directory / "adapter_config.json"
    said = read_json(file)
    kind = said.get("peft_type")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # An unknown peft_type is a KeyError, and any other value may raise anything.
        raise InputError(f"{file}: peft can't read it, peft_type {kind!r} ({first_line(error)})") from None
    start = getattr(config, "init_lora_weights", True)
    # The file is asked as well: an older peft leaves out the keys that it does not know.
    unsupported = [key for key in NOT_PLAIN if said.get(key) or getattr(config, key, None)]
    if isinstance(start, str) and start.startswith(CHANGE_THE_BASE):
        unsupported = [f"init_lora_weights: {start}"]
    if type(config) is not LoraConfig or unsupported:
        raise InputError(
            f"{directory}: a {unsupported[0] if unsupported else kind} adapter is not a plain LoRA delta; merge it "
            "into a checkpoint with peft's merge_and_unload first"
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
            with_shape(unchecked, skeleton.backbone[parameter], parameter, directory)()
            contents.replaced[parameter] = read
    return contents


def _require_complete_pairs(directory: Path, pairs: Mapping[str, Mapping[str, object]], skeleton: Skeleton) -> None:
    """Raise an InputError unless every adapted matrix has both factors and belongs to the backbone."""
    for parameter, pair in pairs.items():
        if parameter in skeleton.head:
            raise InputError(f"{directory}: LoRA on the head ({parameter}); save the head whole (modules_to_save)")
        if pair.keys() != {"A", "B"}:
            raise InputError(f"{directory}: {parameter} needs one lora_A and one lora_B, found {sorted(pair)}")


def _low_rank(
    directory: Path, config: LoraConfig, name: str, pair: Mapping[str, Callable[[], Tensor]], skeleton: Skeleton
) -> LowRank:
    """Return one matrix's adapter. InputError unless shapes and rank are those of the base model and the config.

    The scale of B A is alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """
    a, b = pair["A"]().shape, pair["B"]().shape
    rank = _setting(directory, "r", config.r, "rank_pattern", config.rank_pattern, name)
    alpha = _setting(directory, "lora_alpha", config.lora_alpha, "alpha_pattern", config.alpha_pattern, name)
    if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank or rank < 1:
        raise InputError(
            f"{directory}: {name} has factors A {tuple(a)} and B {tuple(b)}, and its rank in adapter_config.json is "
            f"{rank:g}; copy the adapter again, config and tensors of one run"
        )
    transposed = name in skeleton.transposed | skeleton.embeddings
    found = torch.Size((a[1], b[0]) if transposed else (b[0], a[1]))
    if found != skeleton.backbone[name]:
        raise InputError(shape_message(directory, name, found, skeleton.backbone[name]))
    scale = float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
    return LowRank(pair["A"], pair["B"], scale, transposed)


def _setting(directory: Path, key: str, default: Any, patterns_key: str, patterns: Any, parameter: str) -> float:
    """Return the rank or alpha of one matrix. InputError that names the key if it is no finite number."""
    try:
        found = pattern_of(list(patterns or {}), parameter.removesuffix(".weight"))
        key, value = (f"{patterns_key}[{found!r}]", patterns[found]) if found in (patterns or {}) else (key, default)
    except (re.error, TypeError) as error:
        raise InputError(
            f"{directory / 'adapter_config.json'}: {patterns_key}: {first_line(error)}; expected module names or "
            "regular expressions, each with a number"
        ) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{directory / 'adapter_config.json'}: {key} is {value!r}; expected a number")
    return value


def _finite(read: Callable[[], Tensor], key: str, directory: Path) -> Tensor:
    return require_weights(read(), key, str(directory))


def _adapted(base: Checkpoint, parameter: str, lora: LowRank) -> Tensor:
    """Return W + scale * B A in float32 or float64."""
    weight, a, b = base[parameter], lora.A(), lora.B()
    exact = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(exact) + lora.scale * lora.oriented(b.to(exact) @ a.to(exact))


def _known_name(name: str, skeleton: Skeleton) -> str | None:
    """Return the model's name of a parameter, which an adapter may store without the base model's prefix."""
    known = skeleton.backbone.keys() | skeleton.head
    candidates = (name, skeleton.prefix + name, skeleton.own_name(name))
    return next((candidate for candidate in candidates if candidate in known), None)
