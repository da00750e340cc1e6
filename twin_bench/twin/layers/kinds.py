"""Replacing a model's layers: the table of kinds, and `install`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers.base import TwinLayer
from twin_bench.twin.layers.embedding import TiedLinear, TwinEmbedding
from twin_bench.twin.layers.linear import TwinConv1D, TwinLinear
from twin_bench.twin.layers.norm import TwinLayerNorm, TwinRMSNorm

TWINS: tuple[type[TwinLayer], ...] = (TwinLinear, TwinConv1D, TwinEmbedding, TwinLayerNorm, TwinRMSNorm)
"""The kinds of layers that a twin can fuse. A layer is replaced by the first kind that `stands_for` it."""


def install(model: nn.Module, exclusive: Mapping[str, Exclusive]) -> Fusion:
    """Replace every layer of `model` that some expert changes, and return the Fusion that controls the new layers.

    Args:
        model: A Hugging Face model that holds the shared expert. It is changed in place.
        exclusive: Each expert's exclusive vector, under `model`'s parameter names.

    Raises:
        InputError: An expert changes a parameter that the model lacks, or one of a layer that can't be fused per row.
    """
    fusion = Fusion(len(exclusive))
    modules = dict(model.named_modules())
    tied = {id(layer.weight): path for path, layer in modules.items() if type(layer) is nn.Linear}
    for path, names in _changed_layers(exclusive).items():
        layer = modules.get(path)
        if layer is None or any(name.rpartition(".")[2] not in layer._parameters for name in names):
            raise InputError(f"the model has no parameter {names[0]}, which an expert changes")
        kind = _kind_for(layer, names[0])
        table = layer._parameters["weight"]
        twin = kind(layer, fusion, path, exclusive)
        model.set_submodule(path, twin)
        if isinstance(twin, TwinEmbedding) and id(table) in tied:
            output = tied[id(table)]
            model.set_submodule(output, TiedLinear(modules[output], twin))
    return fusion


def _changed_layers(exclusive: Mapping[str, Exclusive]) -> dict[str, list[str]]:
    """Return the paths of the layers that some expert changes, each with the names of its changed parameters."""
    changed: dict[str, list[str]] = {}
    for name in sorted({name for e in exclusive.values() for name in (*e.factors, *e.vectors)}):
        changed.setdefault(name.rpartition(".")[0], []).append(name)
    return changed


def _kind_for(layer: nn.Module, name: str) -> type[TwinLayer]:
    """Return the kind that replaces `layer`, which holds the parameter `name`. InputError if there is none."""
    kind = next((kind for kind in TWINS if kind.stands_for(layer)), None)
    if kind is None:
        known = ", ".join(module.__name__ for kind in TWINS for module in kind.replaces)
        raise InputError(f"{name} belongs to a {type(layer).__name__}: twins fuse {known} and RMS norms")
    if "experts" in name.split(".")[:-1]:
        raise InputError(
            f"{name} belongs to one expert of a mixture of experts, whose input does not say which row a token is "
            "from; give experts that leave it unchanged (adapters on attention layers, for example)"
        )
    return kind
