"""LiNeS (Wang et al., 2024): the deeper a layer, the more of a merge it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from twin_bench.errors import InputError, UnsuitedError
from twin_bench.merging.registry import MergeMethod, find_method, merge_method
from twin_bench.merging.task_vectors import Merged, TaskVectors

BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|resblocks)\.(\d+)\.")
EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b|\bshared\b")


@merge_method(title="LiNeS", paper="arXiv:2410.17146", track="data-free")
def lines(
    vectors: TaskVectors,
    *,
    merge: str = "task_arithmetic",
    alpha: float | Literal["auto"] = "auto",
    beta: float = 1.0,
    **options: Any,
) -> Mapping[str, Tensor]:
    """theta_0 + (alpha + beta l / (L - 1)) tau, tau the task vector of another merge and l = 0 .. L - 1 the layer.

    `merge` names that method, of the track data-free, and `options` are its own. alpha "auto" is the authors' for
    several tasks, norm_1(sum_t tau_t) / (T norm_1(tau)) over the whole model: on task arithmetic the first layer is
    the average's. The authors choose beta on validation rows and leave the merge unscaled; with beta 1 the merge's
    `scaling` is that beta. The layer is the first number in a parameter's name after layer, layers, h, block, blocks
    or resblocks. Embeddings count as the first layer and all else outside the blocks as the last; the authors' code,
    for CLIP's image encoders, gives all of it the first layer's scale.

    Raises UnsuitedError where the names hold fewer than two layers, and InputError for an alpha that is neither a
    number nor "auto", or as the merge itself does.
    """
    if alpha != "auto" and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise InputError(f'lines: alpha must be a number or "auto", not {alpha!r}')
    count = layers(vectors)
    inner = cast(MergeMethod, find_method(merge))  # MergeMethod.given lets no other kind pass
    merged = cast(Merged, inner.function(vectors, **options))
    first = averaging_alpha(vectors, merged) if alpha == "auto" else alpha

    def scale(name: str, base: Tensor, theta: Tensor) -> Tensor:
        return base + (first + beta * depth(name, count)) * (theta - base)

    return merged.map(scale)


def layers(vectors: TaskVectors) -> int:
    """Return the number of blocks that the parameters' names tell of; fewer than two are an UnsuitedError."""
    count = max((int(found[1]) + 1 for found in map(BLOCK.search, vectors) if found), default=0)
    if count < 2:
        raise UnsuitedError("lines: it scales by depth, and the parameters' names hold no two layers (layers.0., h.0.)")
    return count


def depth(name: str, count: int) -> float:
    """Return where a parameter stands among `count` blocks: 0 the first and the embeddings, 1 the last and after it."""
    if block := BLOCK.search(name):
        return int(block[1]) / (count - 1)
    return 0.0 if EMBEDDING.search(name) else 1.0


def averaging_alpha(vectors: TaskVectors, merged: Merged) -> float:
    """Return norm_1(sum_t tau_t) / (T norm_1(tau)) over the whole model; 0 where the merge is the base."""
    total = norm = torch.zeros((), dtype=torch.float64)
    for name in vectors.floating():
        total = total + vectors[name].sum(dim=0).abs().sum()
        norm = norm + (merged.exact(name) - vectors.base[name]).abs().sum()
    return float(total / (len(vectors.experts) * norm)) if norm else 0.0
