"""The 1-D weights and biases of all layers, one behind the other: rows get theirs in one product."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from twin_bench.twin.placement import device_of, values_of

VectorKind = Literal["vectors", "bias_vectors"]
Place = tuple[torch.dtype, torch.device]
"""The dtype of a layer, and the device where it runs."""


class Stack(NamedTuple):
    """All layers' 1-D weights, or biases, that some expert changes: the shared ones (total,), one behind the other.

    `vectors` (experts, total) are the experts' differences, and `places` the layers' places by their ids. `fused`
    (total,) is where a fusion writes: a compiled graph reads the fused vectors in the same place each time.
    """

    shared: Tensor
    vectors: Tensor
    places: dict[int, slice]
    fused: Tensor


def stacked(layers: Iterable[Any], kind: VectorKind) -> dict[Place, Stack]:
    """Return the stack of the layers' vectors of each dtype and device."""
    found: dict[Place, list[tuple[Any, Tensor, Tensor]]] = {}
    for layer in layers:
        vectors = getattr(layer, kind, None)
        if vectors is not None:
            shared = values_of(layer, "bias" if kind == "bias_vectors" else "weight")
            found.setdefault((layer.weight.dtype, device_of(layer)), []).append((layer, shared, vectors))
    stacks = {}
    for place, own in found.items():
        ends = list(itertools.accumulate(vectors.shape[1] for _, _, vectors in own))
        spans = itertools.starmap(slice, itertools.pairwise([0, *ends]))
        places = {id(layer): span for (layer, _, _), span in zip(own, spans, strict=True)}
        one = torch.cat([one for _, one, _ in own])
        stacks[place] = Stack(one, torch.cat([one for _, _, one in own], dim=1), places, torch.empty_like(one))
    return stacks
