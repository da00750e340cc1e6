"""Checkpoints as lazy mappings from parameter name to tensor.

A `Skeleton` says which parameters a model has (from its config alone, nothing allocated); a checkpoint on
disk, full or a PEFT LoRA adapter, is then a read-only mapping over exactly those names. One tensor is read
at a time: merging never holds whole models.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from twin_bench.compat import Conv1D, pattern_of
from twin_bench.errors import InputError
from twin_bench.finite import require_finite

TaskType = Literal["sequence_classification", "causal_lm"]
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
"""What PEFT puts into a parameter's name."""
AUTO_MODEL: dict[TaskType, Any] = {
    "sequence_classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of a model's parameters, heads apart.

    `backbone` holds what experts share and merge; `head` what belongs to one task (for a sequence
    classifier everything outside the base model: classifier, score, ...; empty for a causal LM).
    `head_output` is the head's weight with a row a label. `transposed` are Conv1D weights,
    stored (in, out), `embeddings` those of embedding tables.
    """

    task_type: TaskType
    prefix: str
    backbone: Mapping[str, torch.Size]
    head: frozenset[str]
    head_output: str | None
    transposed: frozenset[str]
    embeddings: frozenset[str]


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of the model in `directory`; InputError when there is none."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: no readable config.json ({_first_line(error)})") from None


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; InputError that names it where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: can't be read as JSON ({_first_line(error)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def skeleton(config: Any, task_type: TaskType) -> Skeleton:
    """Return the parameters that a model of `config` has, from its class built on the meta device."""
    model = meta_model(config, task_type, num_labels=2)
    prefix = f"{model.base_model_prefix}."
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    head = frozenset(n for n in parameters if task_type == "sequence_classification" and not n.startswith(prefix))
    three_labels = dict(meta_model(config, task_type, num_labels=3).named_parameters()) if head else {}
    output = (n for n in sorted(head) if parameters[n] != three_labels[n].shape and len(parameters[n]) == 2)
    return Skeleton(
        task_type=task_type,
        prefix=prefix,
        backbone={name: shape for name, shape in parameters.items() if name not in head},
        head=head,
        head_output=next(output, None),
        transposed=_weights_of(model, Conv1D),
        embeddings=_weights_of(model, nn.Embedding),
    )


def meta_model(config: Any, task_type: TaskType, *, num_labels: int) -> Any:
    """Return the transformers model of `config` on the meta device: shapes and modules, nothing allocated."""
    config = copy.deepcopy(config)
    config.num_labels = num_labels
    try:
        with torch.device("meta"):
            return AUTO_MODEL[task_type].from_config(config)
    except ValueError as error:
        raise InputError(f"model type {config.model_type!r} has no {task_type} class: {_first_line(error)}") from None


def context_window(config: Any) -> int:
    """Return how many tokens an input of a model can have."""
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    positions = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 2048)
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # their positions begin after the padding's
        positions -= config.pad_token_id + 1
    return positions


class LowRank(NamedTuple):
    """A LoRA adapter of one matrix: scale * B A, A (r, n) and B (m, r) read when asked for."""

    A: Callable[[], Tensor]
    B: Callable[[], Tensor]
    scale: float


class Checkpoint(Mapping[str, Tensor]):
    """The backbone parameters of one model under a skeleton's names, read when asked for.

    `head` holds the task head's tensors, read likewise. Reading a tensor that holds NaN or inf is an
    InputError that names it. Of an adapter `low_rank` are the factors of what it changes by a product, and
    `replaced` what it replaces whole.
    """

    def __init__(
        self,
        source: str,
        backbone: Mapping[str, Callable[[], Tensor]],
        head: Mapping[str, Callable[[], Tensor]],
        low_rank: Mapping[str, LowRank] | None = None,
        replaced: Iterable[str] = (),
    ) -> None:
        self.source = source
        self._backbone = backbone
        self._head = head
        self.low_rank = dict(low_rank or {})
        self.replaced = frozenset(replaced)

    def __getitem__(self, name: str) -> Tensor:
        return require_finite(self._backbone[name](), name, self.source)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; of a memory-mapped one nothing is read for it."""
        return self._backbone[name]().dtype

    def __contains__(self, name: object) -> bool:
        return name in self._backbone  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._backbone)

    def __len__(self) -> int:
        return len(self._backbone)

    def head(self) -> dict[str, Tensor]:
        """Return the task head's tensors by name; empty when the checkpoint has none."""
        return {name: require_finite(read(), name, self.source) for name, read in self._head.items()}


def open_checkpoint(directory: Path, skeleton: Skeleton, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a full Hugging Face checkpoint (safetensors, sharded or not).

    Names are matched with or without the base model's prefix, so a bare backbone and a model with a head
    read alike. A missing tensor, or one of another shape, is an InputError. A pickle is refused unless
    `allow_pickle`, and then read with `weights_only=True`.
    """
    stored = _stored_tensors(directory, "model", "pytorch_model", allow_pickle=allow_pickle)

    def find(name: str) -> Callable[[], Tensor]:
        bare = name.removeprefix(skeleton.prefix)
        for candidate in (name, bare, _legacy(name), _legacy(bare)):
            if candidate in stored:
                return stored[candidate]
        raise InputError(f"{directory}: tensor {name} is missing; is it a checkpoint of another architecture?")

    readers = {name: find(name) for name in skeleton.backbone}
    head = {name: stored[name] for name in sorted(skeleton.head & stored.keys())}
    checked = {name: _with_shape(read, skeleton.backbone[name], name, directory) for name, read in readers.items()}
    return Checkpoint(str(directory), checked, head)


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
    stored = _stored_tensors(directory, "adapter_model", "adapter_model", allow_pickle=allow_pickle)
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
            replaced[parameter] = _with_shape(read, skeleton.backbone[parameter], parameter, directory)

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
            raise InputError(_shape_message(directory, parameter, delta.shape, weight.shape))
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


def _weights_of(model: nn.Module, kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kind))


def _stored_tensors(
    directory: Path, stem: str, pickle_stem: str, *, allow_pickle: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return a reader for every tensor stored in `directory`, single file or shards."""
    index = directory / f"{stem}.safetensors.index.json"
    single = directory / f"{stem}.safetensors"
    pickle = directory / f"{pickle_stem}.bin"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: no weight_map in it; copy the checkpoint again")
        for shard in set(shards.values()):
            if Path(shard).name != shard:
                raise InputError(f"{index}: shard name {shard!r} leaves the directory")
        return {key: functools.partial(_read_tensor, directory / shard, key) for key, shard in shards.items()}
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return {key: functools.partial(_read_tensor, single, key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputError(f"{single}: not a readable safetensors file ({error})") from None
    if pickle.is_file():
        if not allow_pickle:
            raise InputError(
                f"{pickle}: a pickle can run code when read; convert it (from_pretrained, then "
                "save_pretrained writes safetensors) or set allow_pickle: true"
            )
        tensors = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)
        return {key: functools.partial(tensors.__getitem__, key) for key in tensors}
    raise InputError(f"{directory}: no {stem}.safetensors there; is it a checkpoint or an adapter?")


def _read_tensor(file: Path, key: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(key)
            return tensor
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: tensor {key} can't be read ({_first_line(error)})") from None


def _with_shape(read: Callable[[], Tensor], expected: torch.Size, name: str, directory: Path) -> Callable[[], Tensor]:
    def checked() -> Tensor:
        tensor = read()
        if tensor.shape != expected:
            raise InputError(_shape_message(directory, name, tensor.shape, expected))
        return tensor

    return checked


def _shape_message(source: Path, name: str, found: torch.Size, expected: torch.Size) -> str:
    hint = "; the vocabularies differ: resize it to the base model's" if "embed" in name else ""
    return f"{source}: tensor {name} is {tuple(found)}, the base model's is {tuple(expected)}{hint}"


def _known_name(name: str, skeleton: Skeleton) -> str | None:
    known = skeleton.backbone.keys() | skeleton.head
    return next((n for n in (name, skeleton.prefix + name) if n in known), None)


def _legacy(name: str) -> str:
    """Return the name under which checkpoints of the first BERT releases hold LayerNorm's parameters."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
