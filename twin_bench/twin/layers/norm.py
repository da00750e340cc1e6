"""Norms: each row is scaled by its own weight and bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers.base import TwinLayer, by_row


class TwinLayerNorm(TwinLayer):
    """nn.LayerNorm over the last dimension, with exclusive vectors."""

    replaces: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm,)

    def __init__(self, layer: nn.LayerNorm, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__(layer, fusion, name, exclusive)
        self.normalized_shape, self.eps = layer.normalized_shape, layer.eps

    @by_row
    def forward(self, x: Tensor) -> Tensor:
        """Return x (batch, ..., n), normalised and then scaled by each row's own weight and bias."""
        if self.fusion.mode != "rows":
            return F.layer_norm(x, self.normalized_shape, *self.current(), self.eps)
        y, weight = F.layer_norm(x, self.normalized_shape, eps=self.eps), self.row_vector(x.ndim)
        bias = self.row_bias(x.ndim)
        return y * weight if bias is None else torch.addcmul(bias, y, weight)


class TwinRMSNorm(TwinLayer):
    """An RMS norm with exclusive vectors: a ...RMSNorm or ...T5LayerNorm whose one parameter is a weight (n,).

    Llama's, Qwen's, Gemma's and T5's norms differ in how they apply the weight, so the original module computes the
    result, with another weight; a weight per row is broadcast over the row's tokens.
    """

    @classmethod
    def stands_for(cls, layer: nn.Module, parent: nn.Module) -> bool:
        """Return whether `layer` is named so and has one parameter, a weight of one dimension."""
        parameters = [(name, weight.ndim) for name, weight in layer._parameters.items() if weight is not None]
        return parameters == [("weight", 1)] and type(layer).__name__.endswith(("RMSNorm", "T5LayerNorm"))

    def __init__(self, layer: nn.Module, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__(layer, fusion, name, exclusive)
        del layer._parameters["weight"]
        self.layer = layer

    @by_row
    def forward(self, x: Tensor) -> Tensor:
        """Return x (batch, ..., n), normalised and then scaled by each row's own weight."""
        weight = self.current()[0] if self.fusion.mode != "rows" else self.row_vector(x.ndim)
        normed: Tensor = type(self.layer).forward(_Weighted(self.layer, weight), x)
        return normed


class _Weighted:
    """A module with another weight, to be given to the module's forward. The module itself does not change."""

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        self._layer, self.weight = layer, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
