"""Embedding tables, and output layers that share a table's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers.base import TwinLayer, broadcastable, overwritable


class TwinEmbedding(TwinLayer):
    """nn.Embedding with exclusive vectors, weight (vocabulary, width).

    Only the rows of the tokens in a batch are fused, in every mode. A token then costs R * width multiplications;
    a fused copy of the table would cost that for every token of the vocabulary. Experts that keep single entries of the
    table have such a copy in mode `fused`: it costs no more than the entries.
    transformers' scaled embeddings (Gemma's, BART's) multiply the result by `embed_scale`.
    """

    replaces: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    reads_rows = True
    embed_scale: Tensor | float | None

    @classmethod
    def stands_for(cls, layer: nn.Module, parent: nn.Module) -> bool:
        """Return whether `layer` is an nn.Embedding or one of transformers' scaled embeddings."""
        scaled = isinstance(layer, nn.Embedding) and type(layer).__name__.endswith("ScaledWordEmbedding")
        return scaled or super().stands_for(layer, parent)

    def __init__(self, layer: nn.Embedding, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__(layer, fusion, name, exclusive)
        self.padding_idx = layer.padding_idx
        _keep_scale(self, layer)

    def fuse(self, weights: Tensor, bias_weights: Tensor) -> None:
        """Store the weights (experts,) of the factors' columns. `forward` fuses the rows of the table that it reads.

        A table of which experts keep single entries is fused whole.
        """
        if self.entries is not None:
            super().fuse(weights, bias_weights)
        else:
            columns = self._columns()
            self.fused_weight = overwritable(self.fused_weight, columns).copy_(columns)

    def scale(self, dims: int) -> Tensor:
        """Return the columns' weights: (R,), or in mode `rows` (batch, 1, ..., R) with `dims` dimensions."""
        if self.fusion.mode == "fused":
            return self.current()[0]
        return broadcastable(self._columns(), dims)

    def _columns(self) -> Tensor:
        """Return the columns' weights, in the mode `rows` a line of them for each row."""
        return self.fusion.kept(self, "columns", lambda: self.fusion.cast(self.A)[..., self.owner])

    def whole(self, weight: Tensor) -> Tensor | None:
        """Return the table (vocabulary, width) that all rows share. None if it is fused where it is read.

        `weight` is the shared expert's table, as the layer that reads it has it.
        """
        if self.fusion.mode == "shared":
            return weight
        return self.current()[0] if self.fusion.mode == "fused" and self.entries is not None else None

    def looked_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Return the fused table's rows (batch, length, width) of token ids (batch, length), before they are scaled.

        Ids (length,) are those of every row of the batch. `weight` is the shared expert's table.
        """
        if (table := self.whole(weight)) is not None:
            return F.embedding(ids, table)
        if ids.ndim == 1 and self.fusion.mode == "rows":
            ids = ids[None]
        embedded = F.embedding(ids, weight)
        if len(self.owner):
            embedded = embedded + (F.embedding(ids, self.B) * self.scale(ids.ndim + 1)) @ self.A
        if self.entries is not None:
            embedded = embedded + self.entries.looked_up(ids, self.fusion).to(embedded)
        return embedded

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (batch, length, width) of token ids (batch, length)."""
        return _scaled(self.looked_up(ids, self.weight), self.embed_scale)


class TiedEmbedding(nn.Module):
    """An embedding whose weight is another's table: an encoder's and a decoder's are. It is fused from its factors."""

    weight: Tensor
    embed_scale: Tensor | float | None

    def __init__(self, layer: nn.Module, table: TwinEmbedding) -> None:
        super().__init__()
        self.register_parameter("weight", layer._parameters["weight"])
        _keep_scale(self, layer)
        self._table = (table,)  # The model owns the table. The tuple keeps it from being registered here as well.

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (batch, length, width) of token ids (batch, length)."""
        (table,) = self._table
        return _scaled(table.looked_up(ids, self.weight), self.embed_scale)


class TiedLinear(nn.Module):
    """An output layer whose weight is the embedding table. It is fused from the table's factors."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, table: TwinEmbedding) -> None:
        super().__init__()
        self.register_parameter("weight", layer._parameters["weight"])
        self.register_parameter("bias", layer._parameters["bias"])
        self._table = (table,)  # The model owns the table. The tuple keeps it from being registered here as well.

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, ..., vocabulary) for x (batch, ..., width)."""
        (table,) = self._table
        if (whole := table.whole(self.weight)) is not None:
            return F.linear(x, whole, self.bias)
        y = F.linear(x, self.weight, self.bias)
        if len(table.owner):
            y = y + F.linear(F.linear(x, table.A) * table.scale(x.ndim), table.B)
        if table.entries is not None:
            table.entries.add_products(y, x, table.fusion, F.linear)
        return y


def _keep_scale(twin: Any, layer: nn.Module) -> None:
    """Give `twin` the number that `layer` multiplies its result by. Gemma's is a tensor, BART's a float."""
    scale = getattr(layer, "embed_scale", None)
    if isinstance(scale, Tensor):
        twin.register_buffer("embed_scale", scale, persistent=False)
    else:
        twin.embed_scale = scale


def _scaled(embedded: Tensor, scale: Tensor | float | None) -> Tensor:
    if isinstance(scale, Tensor):
        scale = scale.to(embedded)
    return embedded if scale is None else embedded * scale
