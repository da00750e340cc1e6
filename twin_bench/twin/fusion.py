"""Fusion: theta*(x) = theta_s + sum_t w_t(x) v_t for every row of a mixed batch, exactly.

The layers that some expert changes are replaced with twins of themselves (`twin_bench.twin.layers`). Each runs in one
of three ways, set by the model's one `Fusion`:

- shared: theta_s alone, as the router's features need it;
- fused:  W = W_s + B diag(w) A built once, then the plain layer (`Fusion.fuse`);
- rows:   y = W_s x + B (w * (A x)), every row with weights of its own (`Fusion.per_row`).

B and A hold all experts' factors side by side: R = sum_t r_t columns, column c belonging to expert `owner[c]`.
A batch multiplies the columns of those experts alone that some row of it gives a weight; or all experts' joint
basis (`twin_bench.twin.basis`), where there is one and it has fewer.
Biases and norms are fused per row as well, and embeddings through the factors' gathered rows; an output layer
that is tied to the embeddings is fused as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from twin_bench.twin.plan import Costs


class Fusion:
    """How the twin layers of one model run at the moment, and with which weights.

    `bias_weights` are those of biases; they differ from `weights` only under the paper protocol, where
    biases come whole from the true task's expert.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.mode: Literal["shared", "fused", "rows"] = "shared"
        self.weights: Tensor | None = None
        self.bias_weights: Tensor | None = None
        self.layers: list[FusedLayer] = []
        self._fused: tuple[Tensor, Tensor] | None = None
        self._columns: dict[tuple[int, ...], Columns] = {}

    @contextmanager
    def fuse(self, weights: Tensor, bias_weights: Tensor | None = None) -> Iterator[None]:
        """Run with weights (experts,) fused into every layer; rebuilt only when they are not the last ones."""
        bias_weights = weights if bias_weights is None else bias_weights
        if self._fused is None or not all(map(torch.equal, self._fused, (weights, bias_weights))):
            self._fused = None
            for layer in self.layers:
                layer.fuse(weights, bias_weights)
            self._fused = (weights.clone(), bias_weights.clone())
        with self._running("fused", weights, bias_weights):
            yield

    @contextmanager
    def per_row(self, weights: Tensor, bias_weights: Tensor | None = None) -> Iterator[None]:
        """Run each row b of a batch with its own weights[b] of a (batch, experts) tensor."""
        with self._running("rows", weights, weights if bias_weights is None else bias_weights):
            yield

    def follow(self, weights: Tensor) -> None:
        """Run each row b with weights[b] from here on, as `per_row` does: weights that the model itself decides."""
        self.mode, self.weights, self.bias_weights, self._columns = "rows", weights, weights, {}

    def columns(self, owner: Tensor, ranks: tuple[int, ...]) -> Columns:
        """Return which of a layout's columns the rows use, and their weights; found once a forward."""
        if ranks not in self._columns:
            assert self.weights is not None
            active = self.weights.any(dim=0)
            used = None if bool(active.all()) else active[owner].nonzero().squeeze(1)
            self._columns[ranks] = Columns(used, self.weights[:, owner if used is None else owner[used]])
        return self._columns[ranks]

    def costs(self) -> Costs:
        """Return the planner's costs from the layers' shapes, in multiplications a plain token takes."""
        matrices = [layer for layer in self.layers if layer.is_matrix]
        plain = sum(layer.weight.numel() for layer in matrices) or 1
        fuse, columns = [0.0] * self.experts, [0.0] * self.experts
        for layer in matrices:
            for expert, rank in enumerate(layer.ranks):
                fuse[expert] += rank * layer.weight.numel() / plain
                columns[expert] += rank * sum(layer.weight.shape) / plain
        joint = sum(layer.joint_cost() for layer in matrices) / plain
        return Costs(tuple(fuse), rebuild=REBUILD_TOKENS, columns=tuple(columns), joint=joint)

    @contextmanager
    def _running(
        self, mode: Literal["fused", "rows"], weights: Tensor | None, bias_weights: Tensor | None
    ) -> Iterator[None]:
        before = self.mode, self.weights, self.bias_weights, self._columns
        self.mode, self.weights, self.bias_weights, self._columns = mode, weights, bias_weights, {}
        try:
            yield
        finally:
            self.mode, self.weights, self.bias_weights, self._columns = before


class Columns(NamedTuple):
    """Columns that a batch uses (None: all) and its rows' weights over them, (batch, columns)."""

    used: Tensor | None
    scale: Tensor


REBUILD_TOKENS = 16.0
"""What writing every fused weight once costs, in tokens of the plain forward: it is bound by memory, not by
multiplications. Measured on two cores for a 6-layer, 384-wide encoder."""


class FusedLayer(Protocol):
    """What Fusion asks of a layer: to fuse itself, and its share of the costs."""

    weight: Tensor
    ranks: tuple[int, ...]
    is_matrix: bool

    def fuse(self, weights: Tensor, bias_weights: Tensor) -> None:
        """Build what the layer runs with in the fused mode, for weights (experts,)."""

    def joint_cost(self) -> float:
        """Return the least multiplications that a token's low-rank path takes, whatever its weights."""
