"""Replacing a model's layers: the table of kinds, and `install`."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers.base import TwinLayer
from twin_bench.twin.layers.embedding import TiedEmbedding, TiedLinear, TwinEmbedding
from twin_bench.twin.layers.linear import TwinConv1D, TwinLinear
from twin_bench.twin.layers.norm import TwinLayerNorm, TwinRMSNorm
from twin_bench.twin.layers.positions import TwinLearnedPositions, TwinRelativeBias
from twin_bench.twin.layers.quantised import TwinQuantised
from twin_bench.twin.placement import in_place_of, is_offloaded

TWINS: tuple[type[TwinLayer], ...] = (
    *(TwinQuantised, TwinLinear, TwinConv1D, TwinRelativeBias, TwinLearnedPositions, TwinEmbedding),
    *(TwinLayerNorm, TwinRMSNorm),
)
"""The kinds of layers that a twin can fuse. A layer is replaced by the first kind that `stands_for` it."""
TOKENS_FIRST = ("xlnet", "longformer")
"""Model types whose layers take (tokens, rows, width), so that a layer can't tell which row a vector is of."""
READ_WHOLE = ("rel_embeddings",)
"""Embeddings whose weight the model reads itself, without calling them: DeBERTa's relative positions."""
READ_POSITIONS = ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj")
"""DeBERTa's layers that read its relative positions, which all rows of a batch share."""


def install(model: nn.Module, exclusive: Mapping[str, Exclusive]) -> Fusion:
    """Replace every layer of `model` that some expert changes, and return the Fusion that controls the new layers.

    Args:
        model: A Hugging Face model that holds the shared expert. It is changed in place.
        exclusive: Each expert's exclusive vector, under `model`'s parameter names.

    Raises:
        InputError: An expert changes a parameter that the model lacks, or one of a layer that can't be fused per row.
    """
    kind_of_model = model.config.model_type if isinstance(model, PreTrainedModel) else ""
    if exclusive and kind_of_model in TOKENS_FIRST:
        raise InputError(f"{type(model).__name__} can't be served as a twin: its layers take tokens before rows")
    fusion = Fusion(len(exclusive), getattr(model, "dtype", torch.float32))
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, list[str]] = {}
    for path, layer in modules.items():
        places.setdefault(id(layer._parameters.get("weight")), []).append(path)
    for path, names in _changed_layers(exclusive).items():
        layer = modules.get(path)
        if layer is None or any(name.rpartition(".")[2] not in layer._parameters for name in names):
            raise InputError(f"the model has no parameter {names[0]}, which an expert changes")
        if path.rpartition(".")[2] in READ_WHOLE:
            raise InputError(
                f"{names[0]} can't be fused per row: the model reads the whole table at once; give experts that leave "
                "it unchanged"
            )
        kind = _kind_for(layer, modules[path.rpartition(".")[0]], names[0])
        sharing = places[id(layer._parameters["weight"])]
        twin = in_place_of(layer, functools.partial(kind, layer, fusion, path, exclusive), at_hand=kind.at_hand)
        for place in sharing:
            parent = model.get_submodule(place.rpartition(".")[0])
            model.set_submodule(place, twin if modules[place] is layer else _tied(modules[place], twin, place))
            twin.placed(parent)
    fusion.keeps_copies = all(layer.fusible and not is_offloaded(layer) for layer in fusion.layers)
    fusion.mixes = not any(_reads_positions(model, path) for path in _changed_layers(exclusive))
    return fusion


def _reads_positions(model: nn.Module, path: str) -> bool:
    """Return whether a layer reads DeBERTa's relative positions, which are one row in place of the batch's."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    if not getattr(config, "relative_attention", False):
        return False
    parent, _, name = path.rpartition(".")
    tokens_as_well = ("query_proj", "key_proj") if getattr(config, "share_att_key", False) else ()
    norm = name == "LayerNorm" and parent.endswith("encoder")
    return norm or name in (*READ_POSITIONS, *tokens_as_well)


def _tied(layer: nn.Module, twin: TwinLayer, path: str) -> nn.Module:
    """Return what replaces `layer`, whose weight is also that of the layer that `twin` has replaced."""
    if isinstance(twin, TwinEmbedding) and type(layer) is nn.Linear:
        return in_place_of(layer, lambda: TiedLinear(layer, twin))
    if isinstance(twin, TwinEmbedding) and TwinEmbedding.stands_for(layer, layer):
        return in_place_of(layer, lambda: TiedEmbedding(layer, twin))
    raise InputError(
        f"{path} is a {type(layer).__name__} that shares its weight with another layer, and twins fuse shared weights "
        "of embeddings and output layers alone; give experts that leave it unchanged"
    )


def _changed_layers(exclusive: Mapping[str, Exclusive]) -> dict[str, list[str]]:
    """Return the paths of the layers that some expert changes, each with the names of its changed parameters."""
    changed: dict[str, list[str]] = {}
    for name in sorted({name for e in exclusive.values() for name in e.names()}):
        changed.setdefault(name.rpartition(".")[0], []).append(name)
    return changed


def _kind_for(layer: nn.Module, parent: nn.Module, name: str) -> type[TwinLayer]:
    """Return the kind that replaces `layer`, which holds the parameter `name`. InputError if there is none."""
    kind = next((kind for kind in TWINS if kind.stands_for(layer, parent)), None)
    if kind is None:
        known = ", ".join(module.__name__ for kind in TWINS for module in kind.replaces)
        raise InputError(f"{name} belongs to a {type(layer).__name__}: twins fuse {known}, positions and RMS norms")
    if "experts" in name.split(".")[:-1]:
        raise InputError(
            f"{name} belongs to one expert of a mixture of experts, whose input does not say which row a token is "
            "from; give experts that leave it unchanged (adapters on attention layers, for example)"
        )
    return kind
