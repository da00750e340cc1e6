"""Fusion: theta*(x) = theta_s + sum_t w_t(x) v_t for every row of a mixed batch, exactly.

theta_s is the shared expert, v_t the exclusive vector of expert t, and w_t(x) the router's fusion weights for input x.
Every layer that some expert changes is replaced by one of `twin_bench.twin.layers`. A model has one `Fusion` object,
which sets the mode in which all these layers run:

- shared: theta_s alone, for the router's features;
- fused:  W = W_s + B diag(w) A is computed once, and the layer runs as a plain layer (`Fusion.fuse`);
- rows:   y = W_s x + B (w * (A x)), with different weights w for each row (`Fusion.per_row`).

Experts that keep single entries of a matrix in place of factors have a matrix D_t each: W = W_s + sum_t w_t D_t, and
y = W_s x + sum_t w_t D_t x over the experts that have a weight in the row (see `twin_bench.twin.layers.entries`).

B and A hold the factors of all experts side by side. They have R = sum_t r_t columns, and column c belongs to expert
`owner[c]`. A batch is multiplied only by the columns of experts that have a weight in some row, or by the experts'
joint basis (`twin_bench.twin.basis`) if there is one and it is cheaper.
Biases and norms are fused for each row as well. Embeddings are fused for the tokens that occur, and an output layer
that is tied to the embeddings uses the embeddings' factors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from twin_bench.twin.plan import Costs


class Fusion:
    """The mode and the fusion weights with which the twin layers of one model run at the moment.

    `weights` is (experts,) in the mode `fused` and (batch, experts) in the mode `rows`. `bias_weights` has the same
    shape and applies to biases. It differs from `weights` only under the protocol paper, which takes all biases from
    the true task's expert.

    A model is in one mode at a time. The blocks of `shared`, `fuse` and `per_row` therefore hold a lock: another thread
    waits until the block ends. A thread may open one block inside another.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._lock = threading.RLock()
        self.mode: Literal["shared", "fused", "rows"] = "shared"
        self.weights: Tensor | None = None
        self.bias_weights: Tensor | None = None
        self.layers: list[FusedLayer] = []
        self._fused: tuple[Tensor, Tensor] | None = None
        self._columns: dict[tuple[int, ...], Columns] = {}
        self._users: dict[int, Tensor] | None = None

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Run the block with the shared expert alone."""
        with self._running("shared", None, None):
            yield

    @contextmanager
    def fuse(self, weights: Tensor, bias_weights: Tensor | None = None) -> Iterator[None]:
        """Run the block with weights (experts,) fused into every layer.

        The fused weights are kept, and computed again only for other weights.
        """
        bias_weights = weights if bias_weights is None else bias_weights
        with self._running("fused", weights, bias_weights):
            if self._fused is None or not all(map(_same, self._fused, (weights, bias_weights))):
                self._fused = None
                for layer in self.layers:
                    layer.fuse(weights, bias_weights)
                self._fused = (weights.clone(), bias_weights.clone())
            yield

    @contextmanager
    def per_row(self, weights: Tensor, bias_weights: Tensor | None = None) -> Iterator[None]:
        """Run the block with weights (batch, experts), of which weights[b] applies to row b of every batch."""
        with self._running("rows", weights, weights if bias_weights is None else bias_weights):
            yield

    def forget(self) -> None:
        """Compute the fused weights anew next time. The model's parameters have changed their dtype or device."""
        self._fused = None

    def follow(self, weights: Tensor) -> None:
        """Run with weights (batch, experts) as `per_row` does, from here on. It is for a router inside the model."""
        self.mode, self.weights, self.bias_weights, self._columns, self._users = "rows", weights, weights, {}, None

    def columns(self, owner: Tensor, ranks: tuple[int, ...]) -> Columns:
        """Return the columns that the rows use and their weights, for factors of `ranks` with columns of `owner`.

        The result is computed once for all layers with the same ranks.
        """
        if ranks not in self._columns:
            assert self.weights is not None
            active = self.weights.any(dim=0)
            used = None if bool(active.all()) else active[owner].nonzero().squeeze(1)
            self._columns[ranks] = Columns(used, self.weights[:, owner if used is None else owner[used]])
        return self._columns[ranks]

    def users(self) -> dict[int, Tensor]:
        """Return the experts that have a weight in some row, each with the indices of these rows.

        The result is computed once for all layers.
        """
        if self._users is None:
            assert self.weights is not None
            rows, experts = self.weights.nonzero(as_tuple=True)
            self._users = {expert: rows[experts == expert] for expert in experts.unique().tolist()}
        return self._users

    def costs(self) -> Costs:
        """Return the planner's costs, computed from the layers' shapes, in multiplications of a plain token."""
        matrices = [layer for layer in self.layers if layer.is_matrix]
        plain = sum(layer.weight.numel() for layer in matrices) or 1
        fuse, columns = [0.0] * self.experts, [0.0] * self.experts
        for layer in matrices:
            for expert in range(len(layer.ranks)):
                fuse[expert] += layer.fuse_cost(expert) / plain
                columns[expert] += layer.row_cost(expert) / plain
        joint = sum(layer.joint_cost() for layer in matrices) / plain
        return Costs(tuple(fuse), rebuild=REBUILD_TOKENS, columns=tuple(columns), joint=joint)

    @contextmanager
    def _running(
        self, mode: Literal["shared", "fused", "rows"], weights: Tensor | None, bias_weights: Tensor | None
    ) -> Iterator[None]:
        with self._lock:
            before = self.mode, self.weights, self.bias_weights, self._columns, self._users
            self.mode, self.weights, self.bias_weights, self._columns, self._users = (
                mode,
                weights,
                bias_weights,
                {},
                None,
            )
            try:
                yield
            finally:
                self.mode, self.weights, self.bias_weights, self._columns, self._users = before

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, which can be neither copied nor pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state without a lock, and make a new one."""
        self.__dict__.update(state, _lock=threading.RLock())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


class Columns(NamedTuple):
    """The indices of the columns that a batch uses (None for all), and the rows' weights of them, (batch, columns)."""

    used: Tensor | None
    scale: Tensor


REBUILD_TOKENS = 16.0
"""The cost of writing every fused weight once, in tokens of the plain forward.

The cost is bound by memory, not by multiplications. It was measured on two cores for a 6-layer, 384-wide encoder.
"""


class FusedLayer(Protocol):
    """The interface of a layer that Fusion controls."""

    weight: Tensor
    ranks: tuple[int, ...]
    is_matrix: bool

    def fuse(self, weights: Tensor, bias_weights: Tensor) -> None:
        """Compute the weight and bias for the mode `fused`, for weights and bias weights (experts,)."""

    def fuse_cost(self, expert: int) -> float:
        """Return what adding an expert's matrix to the weight costs, in multiplications of a plain token."""

    def row_cost(self, expert: int) -> float:
        """Return the multiplications that an expert's matrix costs a token whose row has weights of its own."""

    def joint_cost(self) -> float:
        """Return an upper bound of the multiplications that a token's exclusive vectors cost, for any weights."""
