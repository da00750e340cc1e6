"""LiNeS (Wang et al., 2024): scale a merge by depth, so that deeper layers take more of it."""

from __future__ import annotations

import re
import sys
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

    `merge` names that merge, which must be data-free, and `options` are its options. alpha "auto" is the authors'
    choice for several tasks: norm_1(sum_t tau_t) / (T norm_1(tau)) over the whole model. For task arithmetic the first
    layer is then the average's. The authors choose beta on validation rows and leave the merge unscaled. With beta 1,
    the `scaling` of the merge has the role of that beta.

    The layer is the first number in a parameter's name after layer, layers, h, block, blocks or resblocks. Embeddings
    count as the first layer. All other parameters outside the blocks count as the last layer. The authors' code, for
    CLIP's image encoders, gives all parameters outside the blocks the first layer's scale.

    Raises UnsuitedError if the names hold fewer than two layers. Raises InputError if alpha is neither a number nor
    "auto", or as the merge itself does.
    """
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= sys.float_info.max
    if alpha != "auto" and not number:
        raise InputError(f'lines: alpha must be a number or "auto", not {alpha!r}')
    count = layers(vectors)
    inner = cast(MergeMethod, find_method(merge))  # MergeMethod.given rejects other kinds
    merged = cast(Merged, inner.function(vectors, **options))
    first = averaging_alpha(vectors, merged) if alpha == "auto" else alpha

    def scale(name: str, base: Tensor, theta: Tensor) -> Tensor:
        return base + (first + beta * depth(name, count)) * (theta - base)

    return merged.map(scale)


def layers(vectors: TaskVectors) -> int:
    """Return the number of blocks in the parameters' names. Raises UnsuitedError for fewer than two."""
    count = max((int(found[1]) + 1 for found in map(BLOCK.search, vectors) if found), default=0)
    if count < 2:
        raise UnsuitedError("lines: scaling by depth needs two layers in the parameters' names (layers.0., h.0.)")
    return count


def depth(name: str, count: int) -> float:
    """Return a parameter's depth: 0 for the first of `count` blocks and embeddings, 1 for the last block and others."""
    if block := BLOCK.search(name):
        return int(block[1]) / (count - 1)
    return 0.0 if EMBEDDING.search(name) else 1.0


def averaging_alpha(vectors: TaskVectors, merged: Merged) -> float:
    """Return norm_1(sum_t tau_t) / (T norm_1(tau)) over the whole model, or 0 if the merge is the base."""
    total = norm = torch.zeros((), dtype=torch.float64)
    for name in vectors.floating():
        total = total + vectors[name].sum(dim=0).abs().sum()
        norm = norm + (merged.exact(name) - vectors.base[name]).abs().sum()
    return float(total / (len(vectors.experts) * norm)) if norm else 0.0
