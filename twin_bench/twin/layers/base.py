"""TwinLayer: what all kinds of layers with exclusive vectors have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twin_bench.checkpoints.factors import Factors
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.exclusive.sparse import Sparse
from twin_bench.twin.fusion import Columns, Fusion
from twin_bench.twin.layers.entries import KeptEntries


class TwinLayer(nn.Module):
    """A layer that adds the fused exclusive vectors of all experts to the shared expert's layer.

    A subclass stands for one kind of layer. It names the modules that it replaces in `replaces`, or overrides
    `stands_for`, and defines `forward` for the three modes of `Fusion`. `twin_bench.twin.layers.kinds.TWINS`
    lists the subclasses. `reads_rows` says that it reads single rows of a matrix. `at_hand` says that the model also
    uses the layer outside its forward, so that its weight is never offloaded. `fusible` says that the layer can keep a
    fused copy of its weight.

    `weight` and `bias` are the shared expert's parameters. `bias` is None in a layer without one.
    `B` (m, R) and `A` (R, n) are the factors of all experts side by side. `ranks` holds each expert's number of
    columns, and `owner` (R,) each column's expert. `entries` holds the matrices of which experts keep single entries,
    in the form in which they are stored. It is None if there are none. `vectors` and `bias_vectors`, both (experts, n),
    hold the differences of 1-D weights and of biases. They are None if no expert changes that parameter.
    Factors, entries and vectors have the weight's dtype. They are not part of the state dict.
    """

    replaces: ClassVar[tuple[type[nn.Module], ...]] = ()
    is_matrix = False
    reads_rows = False
    at_hand = False
    fusible: ClassVar[bool] = True
    weight: Tensor
    bias: Tensor | None
    vectors: Tensor | None
    bias_vectors: Tensor | None
    fused_weight: Tensor | None
    fused_bias: Tensor | None
    entries: KeptEntries | None
    B: Tensor
    A: Tensor
    owner: Tensor

    @classmethod
    def stands_for(cls, layer: nn.Module, parent: nn.Module) -> bool:
        """Return whether this kind replaces `layer`, an attribute of `parent`.

        By default it replaces the classes in `replaces`, subclasses not included.
        """
        return type(layer) in cls.replaces

    def __init__(self, layer: nn.Module, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        """Take the parameters of `layer`, and the factors and vectors that the experts hold under its `name`."""
        super().__init__()
        self.fusion = fusion
        self._take(layer)
        self._register_factors([e.factors.get(f"{name}.weight") for e in exclusive.values()])
        self._register_entries([e.sparse.get(f"{name}.weight") for e in exclusive.values()])
        self._register_vectors("vectors", self.weight, [e.vectors.get(f"{name}.weight") for e in exclusive.values()])
        self._register_vectors("bias_vectors", self.bias, [e.vectors.get(f"{name}.bias") for e in exclusive.values()])
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)
        fusion.layers.append(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Change the dtype or the device as a module does. What the fusion has kept is of the ones before."""
        self.fusion.forget()
        return super()._apply(fn, recurse)

    def _take(self, layer: nn.Module) -> None:
        """Take the parameters of the layer that this one replaces."""
        self.register_parameter("weight", layer._parameters["weight"])
        self.register_parameter("bias", layer._parameters.get("bias"))

    def placed(self, parent: nn.Module) -> None:
        """Do what is to be done once this layer is an attribute of `parent`. By default this is nothing."""

    def _register_factors(self, factors: list[Factors | None]) -> None:
        given = [f for f in factors if f is not None]
        self.ranks = tuple(0 if f is None else f.A.shape[0] for f in factors)
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        self.register_buffer("owner", owner.to(self.weight.device), persistent=False)
        if given:
            self._store(torch.cat([f.B for f in given], dim=1), torch.cat([f.A for f in given], dim=0))

    def _store(self, B: Tensor, A: Tensor) -> None:
        """Store all experts' factors, B (m, R) and A (R, n)."""
        self.register_buffer("B", B.to(self.weight), persistent=False)
        self.register_buffer("A", A.to(self.weight), persistent=False)

    def _register_entries(self, matrices: list[Sparse | None]) -> None:
        found = any(matrix is not None for matrix in matrices)
        self.entries = KeptEntries(matrices, self.weight, by_row=self.reads_rows) if found else None

    def _register_vectors(self, buffer: str, parameter: Tensor | None, vectors: list[Tensor | None]) -> None:
        stacked = None
        if parameter is not None and any(vector is not None for vector in vectors):
            zero = torch.zeros_like(parameter)
            stacked = torch.stack([zero if v is None else v.to(zero) for v in vectors])
        self.register_buffer(buffer, stacked, persistent=False)

    def factors(self, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return B (m, r) and A (r, n) of the columns whose indices are in `used`, or of all R columns for None."""
        return (self.B, self.A) if used is None else (self.B[:, used], self.A[used])

    def difference(self, expert: int) -> Tensor:
        """Return what an expert adds to the weight, (m, n), in the weight's dtype."""
        total = torch.zeros_like(self.weight)
        if self.ranks[expert]:
            B, A = self.factors((self.owner == expert).nonzero().squeeze(1))
            total.addmm_(B, A)
        if self.entries is not None and (matrix := self.entries.of(expert)) is not None:
            matrix.add_to(total, 1.0)
        return total

    def fuse(self, weights: Tensor, bias_weights: Tensor) -> None:
        """Compute the fused weight and bias from the shared ones, for a block's weights and bias weights (experts,)."""
        if sum(self.ranks) or self.entries is not None:
            self.fused_weight = overwritable(self.fused_weight, self.weight)
            self._fuse_matrix(weights, self.fused_weight)
        elif self.vectors is not None:
            self.fused_weight = self.fusion.vectors(self, "vectors")
        else:
            self.fused_weight = self.weight.detach()
        if self.bias is not None:
            shared = self.bias_vectors is None
            self.fused_bias = self.bias.detach() if shared else self.fusion.vectors(self, "bias_vectors")

    def _fuse_matrix(self, weights: Tensor, fused: Tensor) -> None:
        """Write the weight that is fused with weights (experts,) into `fused`."""
        if sum(self.ranks):
            used, scale = self.fusion.columns(self)
            B, A = self.factors(used)
            torch.addmm(self.weight, B * scale, A, out=fused)
        else:
            fused.copy_(self.weight)
        if self.entries is not None:
            known = self.fusion.known_weights
            self.entries.add_to(fused, weights if known is None else known)

    def fuse_cost(self, expert: int) -> float:
        """Return what adding an expert's matrix to the weight costs, in multiplications of a plain token."""
        entries = self.entries.fuse_cost(expert) if self.entries is not None else 0.0
        return self.ranks[expert] * self.weight.numel() + entries

    def row_cost(self, expert: int) -> float:
        """Return the multiplications that an expert's matrix costs a token whose row has weights of its own."""
        entries = self.entries.row_cost(expert) if self.entries is not None else 0.0
        return self.ranks[expert] * sum(self.weight.shape) + entries

    def joint_cost(self) -> float:
        """Return an upper bound of the multiplications that a token's exclusive vectors cost, for any weights."""
        return float(sum(self.row_cost(expert) for expert in range(len(self.ranks))))

    def row_columns(self, dims: int) -> Columns:
        """Return the columns in use and each row's weights over them, (batch, 1, ..., r) with `dims` dimensions."""
        used, scale = self.fusion.columns(self)
        return Columns(used, broadcastable(scale, dims))

    def row_bias(self, dims: int) -> Tensor | None:
        """Return each row's bias, (batch, 1, ..., n) with `dims` dimensions, or (n,) if all rows share it."""
        if self.bias is None or self.bias_vectors is None:
            return self.bias
        return broadcastable(self.fusion.vectors(self, "bias_vectors"), dims)

    def row_vector(self, dims: int) -> Tensor:
        """Return each row's 1-D weight, (batch, 1, ..., n) with `dims` dimensions, or (n,) if all rows share it."""
        return self.weight if self.vectors is None else broadcastable(self.fusion.vectors(self, "vectors"), dims)

    def current(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias that all rows share in the modes `shared` and `fused`."""
        if self.fusion.mode == "shared":
            return self.weight, self.bias
        assert self.fused_weight is not None
        return self.fused_weight, self.fused_bias


def overwritable(kept: Tensor | None, like: Tensor) -> Tensor:
    """Return `kept` if it can be written to, else a new tensor of the shape, dtype and device of `like`.

    A tensor that was made under torch.inference_mode() can't be written to outside it.
    """
    if kept is None or (kept.is_inference() and not torch.is_inference_mode_enabled()):
        return torch.empty_like(like)
    return kept


def by_row(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Make a layer's forward accept flattened tokens, (batch * length, n), which OPT passes to its MLP.

    The layer needs to know which tokens belong to a row only if rows have their own weights. Then the wrapper
    restores (batch, length, n) before `forward` runs, and flattens the result again.
    """

    def unflattened(layer: Any, x: Tensor) -> Tensor:
        if x.ndim > 2 or layer.fusion.mode != "rows":
            return forward(layer, x)
        return forward(layer, x.reshape(len(layer.fusion.weights), -1, x.shape[1])).flatten(0, 1)

    return unflattened


def broadcastable(rows: Tensor, dims: int) -> Tensor:
    """Return (batch, n) as (batch, 1, ..., n) with `dims` dimensions."""
    return rows.view(rows.shape[0], *[1] * (dims - 2), rows.shape[1])
