"""The part of a layer whose experts keep single entries of a matrix: fused into the weight, or row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from twin_bench.twin.exclusive.sparse import Sparse
from twin_bench.twin.fusion import Fusion

AT_INDEX, BY_MASK, WHOLE = 100.0, 150.0, 30.0
"""What adding a matrix to a weight costs, in multiplications of a plain token.

It is counted for each kept entry that has an index, for each entry of a matrix with a mask, and of a whole one. Memory
is what they cost. They were measured on one core for matrices of 768 x 768, with batches of 1,024 tokens.
"""
BATCH_TOKENS = 512.0
"""The tokens of a typical batch, over which the cost of writing a matrix out is spread on the path by row."""


class KeptEntries(nn.Module):
    """The entries that each expert keeps of one layer's matrix, in the form in which they are stored.

    A matrix is written out where it is used, so that the memory holds all experts' matrices in their stored form alone.
    """

    def __init__(self, matrices: Sequence[Sparse | None], like: Tensor, *, by_row: bool) -> None:
        """Keep one matrix for each expert, None for an expert without.

        Args:
            matrices: the experts' matrices.
            like: the layer's weight, whose dtype and device their parts get. Bits and positions stay integers.
            by_row: whether the layer reads single rows of the matrices (see `rows`).
        """
        super().__init__()
        self._forms: dict[int, tuple[tuple[int, int], int, tuple[str, ...]]] = {}
        for expert, matrix in enumerate(matrices):
            if matrix is None:
                continue
            matrix = matrix.indexed() if by_row else matrix
            self._forms[expert] = matrix.shape, matrix.count, tuple(matrix.parts)
            for part, tensor in matrix.parts.items():
                dtype = like.dtype if tensor.is_floating_point() else tensor.dtype
                self.register_buffer(f"{part}_{expert}", tensor.to(like.device, dtype), persistent=False)

    def of(self, expert: int) -> Sparse | None:
        """Return an expert's matrix, or None if it keeps nothing of it."""
        if expert not in self._forms:
            return None
        shape, count, parts = self._forms[expert]
        return Sparse(shape, count, {part: self.get_buffer(f"{part}_{expert}") for part in parts})

    def add_to(self, fused: Tensor, weights: Tensor) -> None:
        """Add the experts' matrices, weighted by weights (experts,), to `fused` (m, n) in place."""
        for expert, weight in enumerate(weights.tolist()):
            if weight and (matrix := self.of(expert)) is not None:
                matrix.add_to(fused, weight)

    def used(self, fusion: Fusion, device: torch.device) -> Iterator[tuple[int, Sparse, Tensor]]:
        """Yield what the rows of a batch on `device` use: an expert, its matrix, and the indices of its rows."""
        for expert, rows in fusion.users(device).items():
            if (matrix := self.of(expert)) is not None:
                yield expert, matrix, rows

    def add_products(self, y: Tensor, x: Tensor, fusion: Fusion, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Add each row's weighted sum of products of the experts' matrices to y (batch, ..., out) in place.

        Args:
            y: (batch, ..., out).
            x: (batch, ..., in).
            fusion: in mode `rows`.
            product: a function of the rows that use an expert, and its matrix.
        """
        for expert, matrix, rows in self.used(fusion, y.device):
            own = fusion.cast(y)[rows, expert].view(-1, *[1] * (y.ndim - 1))
            y.index_add_(0, rows, own * product(x[rows], matrix.dense()))

    def looked_up(self, ids: Tensor, fusion: Fusion) -> Tensor:
        """Return the weighted sum of the experts' rows of token ids: (batch, length, width).

        Args:
            ids: (batch, length), or (1, length) for ids that all rows share.
            fusion: in mode `rows`.
        """
        assert fusion.weights is not None
        found, place = ids.unique(return_inverse=True)
        total = torch.zeros((), device=ids.device)
        for expert, matrix, _ in self.used(fusion, ids.device):
            rows = matrix.rows(found)
            total = total + fusion.weights[:, expert].to(rows).view(-1, *[1] * ids.ndim) * rows[place]
        return total

    def fuse_cost(self, expert: int) -> float:
        """Return what adding an expert's matrix to the weight costs, in multiplications of a plain token."""
        if (matrix := self.of(expert)) is None:
            return 0.0
        if "indices" in matrix.parts:
            return AT_INDEX * matrix.count
        return (BY_MASK if "mask" in matrix.parts else WHOLE) * math.prod(matrix.shape)

    def row_cost(self, expert: int) -> float:
        """Return what an expert's matrix costs a token whose row has weights of its own, in multiplications."""
        if (matrix := self.of(expert)) is None:
            return 0.0
        return math.prod(matrix.shape) + self.fuse_cost(expert) / BATCH_TOKENS
