"""Embeddings of positions: learned ones, which make their ids themselves, and T5's relative ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.exclusive.sparse import Sparse
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers.base import TwinLayer, broadcastable
from twin_bench.twin.layers.embedding import TwinEmbedding


class TwinLearnedPositions(TwinEmbedding):
    """Learned embeddings of positions with exclusive vectors: any nn.Embedding named ...LearnedPositionalEmbedding.

    BART's and OPT's compute the positions themselves, each in another way. So the original module looks them up, in
    its table and in the factor B. Its result may have one row for the whole batch, or no dimension for rows at all.
    """

    replaces: ClassVar[tuple[type[nn.Module], ...]] = ()
    reads_rows = False

    @classmethod
    def stands_for(cls, layer: nn.Module, parent: nn.Module) -> bool:
        """Return whether `layer` is an nn.Embedding named ...LearnedPositionalEmbedding."""
        return isinstance(layer, nn.Embedding) and type(layer).__name__.endswith("LearnedPositionalEmbedding")

    def __init__(self, layer: nn.Embedding, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__(layer, fusion, name, exclusive)
        del layer._parameters["weight"]
        self.layer = layer

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Return the embeddings (batch or 1, length, width) of the positions that the original module computes."""
        if (table := self.whole(self.weight)) is not None:
            return self._read(table, *args, **options)
        embedded = self._read(self.weight, *args, **options)
        if len(self.owner):
            embedded = embedded + (self._read(self.B, *args, **options) * self.scale(embedded.ndim)) @ self.A
        if self.entries is not None:
            weights = self.fusion.weights
            assert weights is not None
            for expert, matrix, _ in self.entries.used(self.fusion, embedded.device):
                own = self._read(matrix.dense(), *args, **options)
                embedded = embedded + broadcastable(weights[:, expert : expert + 1].to(own), own.ndim) * own
        return embedded

    def _read(self, table: Tensor, *args: Any, **options: Any) -> Tensor:
        found: Tensor = functional_call(self.layer, {"weight": table}, args, options)
        return found[None] if found.ndim == 2 else found


BIAS_METHODS = ("compute_bias", "compute_position_bias")
"""The methods in which T5's attention and MPNet's encoder look up the biases of relative positions."""


class TwinRelativeBias(TwinLayer):
    """An embedding of relative positions, weight (buckets, heads), with exclusive vectors.

    T5's attention looks up one bias (1, heads, queries, keys) for all rows. Where rows have weights of their own, its
    method is run with each expert's table as well, and every row gets the sum by its weights: a bias is linear in the
    table.
    """

    at_hand = True
    tables: Tensor

    @classmethod
    def stands_for(cls, layer: nn.Module, parent: nn.Module) -> bool:
        """Return whether `parent` computes biases from `layer`."""
        return getattr(parent, "relative_attention_bias", None) is layer and _bias_method(parent) is not None

    def _store(self, B: Tensor, A: Tensor) -> None:
        """Store all experts' factors, B (m, R) and A (R, n), and their products (experts, m, n): they are small."""
        super()._store(B, A)
        own = [self.owner.cpu() == expert for expert in range(len(self.ranks))]
        products = torch.stack([B[:, columns] @ A[columns] for columns in own])
        self.register_buffer("tables", products.to(self.weight), persistent=False)

    def _register_entries(self, matrices: list[Sparse | None]) -> None:
        """Store the entries that experts keep, and their matrices written out in place of the factors' products."""
        super()._register_entries(matrices)
        if self.entries is not None:
            zero = torch.zeros_like(self.weight)
            tables = torch.stack([zero if matrix is None else matrix.dense().to(zero) for matrix in matrices])
            self.register_buffer("tables", tables, persistent=False)

    def placed(self, parent: nn.Module) -> None:
        """Put `biases` in the place of the parent's method."""
        method = _bias_method(parent)
        assert method is not None
        self._lookup = functools.partial(getattr(type(parent), method), parent)
        setattr(parent, method, self.biases)

    def biases(self, *args: Any, **options: Any) -> Tensor:
        """Return the biases that the parent's method computes: (1, heads, queries, keys), or (batch, ...) by row."""
        weights = self.fusion.weights
        if self.fusion.mode != "rows" or weights is None:
            return self._from(self.current()[0], *args, **options)
        biases = self._from(self.weight, *args, **options)
        for table, own in zip(self.tables, weights.to(self.tables).T, strict=True):
            one = self._from(table, *args, **options)
            biases = biases + own.view(-1, *[1] * (one.ndim - 1)) * one
        return biases

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (..., heads) of bucket numbers (...), of the table that `biases` has set."""
        return F.embedding(ids, self._table)

    def _from(self, table: Tensor, *args: Any, **options: Any) -> Tensor:
        self._table = table.detach()
        found: Tensor = self._lookup(*args, **options)
        return found


def _bias_method(parent: nn.Module) -> str | None:
    return next((name for name in BIAS_METHODS if hasattr(type(parent), name)), None)
