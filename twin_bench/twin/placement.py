"""Where the layers of a twin are: a device map for the shared expert, and accelerate's hooks on its layers.

transformers loads the shared expert by a device map, and accelerate takes a batch from device to device. A parameter
that is offloaded to the processor or to the disk comes to a device for its layer's forward alone. At all other times it
is on the meta device, where it has no values.

A twin's layer takes over the hook of the layer that it replaces. What the twin adds, its factors and vectors, stays on
the device where the layer runs. An offloaded layer has no room for a fused copy of its weight, so a twin with such
layers takes the low-rank path alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import CustomDtype, get_balanced_memory, get_max_memory, set_module_tensor_to_device
from torch import Tensor, nn

from twin_bench.checkpoints.skeleton import meta_model
from twin_bench.compat import SINCE_5, Conv1D
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, first_line, nearest, shown
from twin_bench.files import CANNOT_WRITE, named_where_full, require_writable
from twin_bench.twin.device import AUTO, usable_device
from twin_bench.twin.exclusive import Exclusive

Made = TypeVar("Made", bound=nn.Module)

PLANNED = ("auto", "balanced", "balanced_low_0", "sequential")
"""The device maps that are computed from the memory of the devices, by accelerate's names."""
OFFLOADED = ("cpu", "disk")
"""Where a device map keeps weights that run on another device. `cpu` is a device itself where there is no other."""


@dataclass(frozen=True)
class Devices:
    """What a caller says of the devices of a twin.

    `device_map` is one of `PLANNED`, the name of a device, or a mapping from the names of the model's parts to devices,
    `cpu` or `disk`. `max_memory` maps devices to the bytes, or a text such as 10GiB, that a planned map may use.
    `offload_folder` is where weights are written that the disk keeps in another form than the twin's directory does.
    """

    device_map: str | Mapping[str, Any]
    max_memory: Mapping[Any, Any] | None = None
    offload_folder: str | Path | None = None

    @classmethod
    def of(
        cls,
        device_map: str | Mapping[str, Any] | None,
        max_memory: Mapping[Any, Any] | None,
        offload_folder: str | Path | None,
        *,
        device: str | torch.device | None = None,
    ) -> Devices | None:
        """Return these settings, None where they name one device or none. InputError if they contradict each other."""
        if device_map is None:
            for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
                if value is not None:
                    raise InputError(f"{name} {shown(value)}: it is for several devices; give device_map, such as auto")
            return None
        if device not in (None, AUTO):
            raise InputError(f"device {str(device)!r} and device_map {shown(device_map)}: give one of the two")
        return cls(device_map, max_memory, offload_folder)


class Placement(NamedTuple):
    """A device map that is checked, with an entry for every part, and whether fused copies of weights have room."""

    device_map: dict[str, Any]
    copies: bool


def find_placement(
    devices: Devices,
    config: Any,
    task_type: TaskType,
    exclusive: Mapping[str, Exclusive],
    dtype: torch.dtype | None,
    *,
    bits: int | None = None,
) -> Placement:
    """Return where the parts of a twin go.

    Factors, vectors and fused copies of weights count in a planned map. Where the devices have no room for the copies,
    the map is planned without them.

    Args:
        devices: what the caller says.
        config: the shared expert's transformers config.
        task_type: what it serves.
        exclusive: the experts' exclusive vectors.
        dtype: what the twin computes in; None is the dtype of the config.
        bits: those of quantised weights, 4 or 8. None where they are not.

    Raises:
        InputError: quantised weights that would be offloaded, a device that is not there, a map that leaves out a part
            or names one that the model lacks, tied weights on two devices, memory that is none, or a folder that can't
            be written.
    """
    model = meta_model(config, task_type, num_labels=2).to(dtype or getattr(config, "dtype", None) or torch.float32)
    asked = devices.device_map
    if isinstance(asked, Mapping):
        found = Placement(_checked(asked, model), copies=True)
    elif asked in PLANNED:
        found = _planned(devices, model, exclusive, bits)
    else:
        found = Placement({"": _checked_device(asked, "device_map")}, copies=True)
    used = {str(place) for place in found.device_map.values()}
    if bits is not None and (used & {"disk"} or ("cpu" in used and used != {"cpu"})):
        raise InputError(
            "quantised weights can't be offloaded to cpu or disk; name devices whose memory holds them all"
        )
    if task_type == "sequence_classification":
        found = found._replace(device_map=_heads_in_memory(found.device_map, model))
    if "disk" in found.device_map.values() and devices.offload_folder is not None:
        require_writable(Path(devices.offload_folder) / "weights.safetensors")
    if not SINCE_5:
        raise InputError("device_map: a twin on several devices needs transformers 5; install a newer one")
    return found


def _planned(devices: Devices, model: Any, exclusive: Mapping[str, Exclusive], bits: int | None) -> Placement:
    """Return accelerate's map of a model on the meta device, which gets what the twin adds to it as buffers."""
    memory = devices.max_memory
    if memory is not None:
        memory = {int(key) if str(key).isdecimal() else key: size for key, size in memory.items()}
        for key in memory:
            _checked_device(key, "max_memory")
    whole = model.get_parameter  # parameters alone have names that an expert changes
    for number, own in enumerate(exclusive.values()):
        for name, tensors in _added(own):
            layer = model.get_submodule(name.rpartition(".")[0])
            for part, tensor in enumerate(tensors):
                dtype = whole(name).dtype if tensor.is_floating_point() else tensor.dtype
                added = torch.empty(tensor.shape, dtype=dtype, device="meta")
                layer.register_buffer(f"exclusive_{number}_{name.rpartition('.')[2]}_{part}", added)
    copied = {name for own in exclusive.values() for name in (*own.factors, *own.sparse)}
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in copied}
    layers = {n: layer for n, layer in layers.items() if not isinstance(layer, nn.Embedding)}
    if bits is not None:
        return Placement(_inferred(model, str(devices.device_map), memory, _few_bits(model, bits)), copies=False)
    for name, layer in layers.items():
        layer.register_buffer("fused_copy", torch.empty_like(whole(name)))
    found = _inferred(model, str(devices.device_map), memory)
    if "disk" not in found.values() and not _spills(found):
        return Placement(found, copies=True)
    for layer in layers.values():
        del layer._buffers["fused_copy"]
    return Placement(_inferred(model, str(devices.device_map), memory), copies=False)


def _added(own: Exclusive) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield each parameter's name that an expert changes, and the tensors that the twin keeps of the change."""
    for name, factors in own.factors.items():
        yield name, list(factors)
    for name, matrix in own.sparse.items():
        yield name, list(matrix.parts.values())
    for name, vector in own.vectors.items():
        yield name, [vector]


def _few_bits(model: Any, bits: int) -> dict[str, Any]:
    """Return the dtypes of the weights that transformers quantises: those of linear layers but for the output."""
    dtype = CustomDtype.INT4 if bits == 4 else torch.int8
    output = model.get_output_embeddings()
    layers = ((n, layer) for n, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D))
    return {f"{name}.weight": dtype for name, layer in layers if layer is not output}


def _inferred(
    model: Any, mode: str, memory: Mapping[Any, Any] | None, special: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    few = dict(special or {})
    whole = list(getattr(model, "_no_split_modules", None) or [])
    try:
        if mode == "sequential":
            limits = get_max_memory(memory)
        else:
            low = mode == "balanced_low_0"
            limits = get_balanced_memory(model, memory, no_split_module_classes=whole, special_dtypes=few, low_zero=low)
        found = infer_auto_device_map(model, limits, no_split_module_classes=whole, special_dtypes=few)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"max_memory {shown(memory)}: {first_line(error)}; name devices that are there, such as 0 and cpu, each "
            "with bytes or a text such as 10GiB"
        ) from error
    return dict(found)


def _spills(device_map: Mapping[str, Any]) -> bool:
    """Return whether a map leaves weights to the processor that run on another device."""
    used = set(device_map.values())
    return bool(used & {"cpu"}) and bool(used - set(OFFLOADED))


def _checked(given: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return a caller's map. InputError unless it names a device that is there for every part, and for each once."""
    tensors = {*model.state_dict(), *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    parts = {name for name, _ in model.named_modules()} | tensors
    for name in given:
        if name not in parts:
            near = [part for part in parts if part and part.count(".") <= str(name).count(".")]
            raise InputError(f"device_map names {shown(name)}, which the model lacks{nearest(str(name), near)}")
    for name, other in itertools.permutations(given, 2):
        if _holds(name, other):
            raise InputError(
                f"device_map places {other} twice, by its own name and by {name!r}, which holds it; name each part once"
            )
    place = {tensor: next((part for part in given if _holds(part, tensor)), None) for tensor in tensors}
    missing = sorted(tensor for tensor, part in place.items() if part is None)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"device_map leaves out {missing[0]}{more}; name a device for each part of the model")
    found = {name: _checked_device(value, f"device_map: {name or 'the model'}") for name, value in given.items()}
    _require_ties_together(model, {tensor: found[str(part)] for tensor, part in place.items()})
    return found


def _holds(part: str, other: str) -> bool:
    return not part or other == part or other.startswith(f"{part}.")


def _require_ties_together(model: Any, place: Mapping[str, Any]) -> None:
    """Raise an InputError for a parameter of several names, such as a tied embedding, that goes to several devices."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if str(place[name]) != str(place[other]):
            raise InputError(
                f"device_map: {name} and {other} are one weight, and go to {place[name]} and {place[other]}; give both "
                "the same device"
            )


def _checked_device(value: Any, where: str) -> Any:
    """Return a device of a map. InputError if the machine does not have it."""
    if value in OFFLOADED:
        return value
    number = isinstance(value, int) or str(value).isdecimal()
    try:
        found = usable_device(f"cuda:{value}" if number and not isinstance(value, bool) else value)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {first_line(error)}; name a device that is there, cpu or disk") from None
    if found.type == "cuda" and found.index is None:
        return f"cuda:{torch.cuda.current_device()}"
    return str(found)


def _heads_in_memory(device_map: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return a map in which a classifier's head is not on the disk: a twin's directory holds heads apart."""
    own = f"{model.base_model_prefix}."
    return {
        name: "cpu" if value == "disk" and name and not f"{name}.".startswith(own) else value
        for name, value in device_map.items()
    }


@contextmanager
def offloading(folder: str | Path | None) -> Iterator[None]:
    """Raise an InputError that names the folder of offloaded weights if writing there fails in the block."""
    if folder is None:
        yield
        return
    try:
        with named_where_full(Path(folder)):
            yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise InputError(
            f"offload_folder {folder}: weights can't be written there ({error.strerror}); make room, or name another "
            "folder"
        ) from error


def device_of(module: Any) -> torch.device:
    """Return the device on which a module runs: that of its hook, or of its first parameter or buffer."""
    chosen = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if chosen is not None:
        return torch.device(chosen)
    device: torch.device = next(itertools.chain(module.parameters(), module.buffers())).device
    return device


def input_device(model: Any) -> torch.device:
    """Return the device to which a transformers model's inputs go: that of its embeddings."""
    device: torch.device = model.device
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # as CANINE's, which hashes characters
        return device
    return device_of(embeddings) if hasattr(embeddings, "_hf_hook") else device


def require_movable(model: nn.Module) -> None:
    """Raise an InputError for a model whose inputs or weights accelerate takes from device to device."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise InputError("the twin is on the devices of a device_map, and can't be moved or converted; load it anew")


def require_in_memory(model: nn.Module) -> None:
    """Raise an InputError for a model with offloaded weights, which the protocol paper can't replace by its own."""
    if is_offloaded(model):
        raise InputError(
            "protocol paper computes with weights of its own, which can't be offloaded; give devices whose memory "
            "holds the model, or another protocol"
        )


def is_offloaded(model: Any) -> bool:
    """Return whether some weights of a model come to a device for their layer's forward alone."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


def values_of(layer: Any, name: str) -> Tensor:
    """Return the values of a layer's parameter, on the device where the layer runs, if it is offloaded as well."""
    parameter: Tensor = layer._parameters[name]
    hook: Any = getattr(layer, "_hf_hook", None)
    if not parameter.is_meta or hook is None:
        return parameter.detach()
    found: Tensor = hook.weights_map[name]
    return found.to(device_of(layer), parameter.dtype)


def in_place_of(layer: nn.Module, make: Callable[[], Made], *, at_hand: bool = False) -> Made:
    """Return the module that `make` makes of a layer, with the layer's hook: it runs where the layer did.

    The layer's parameters are there while it is made. With `at_hand` they stay: they are not offloaded any more.
    """
    hook: Any = getattr(layer, "_hf_hook", None)
    if hook is None:
        return make()
    remove_hook_from_module(layer)
    if hook.offload:
        for name in [name for name, parameter in layer._parameters.items() if parameter is not None]:
            set_module_tensor_to_device(layer, name, hook.execution_device, value=hook.weights_map[name])
    made = make()
    if not (hook.offload and at_hand):
        add_hook_to_module(made, hook)
    return made
