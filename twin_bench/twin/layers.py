"""Twins of a model's layers: each adds its rows' exclusive vectors as `twin_bench.twin.fusion` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.checkpoints.factors import Factors
from twin_bench.compat import Conv1D
from twin_bench.errors import InputError
from twin_bench.twin.basis import JointBasis, joint_basis
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.fusion import Columns, Fusion

ROUNDINGS = 4.0
"""How many roundings of its weights a layer's joint basis may be off by."""


def by_row(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Show a twin layer (batch, length, n) of what a model gives it as (batch * length, n): OPT flattens its tokens."""

    def unflattened(layer: Any, x: Tensor) -> Tensor:
        if x.ndim > 2 or layer.fusion.mode != "rows":
            return forward(layer, x)
        return forward(layer, x.reshape(len(layer.fusion.weights), -1, x.shape[1])).flatten(0, 1)

    return unflattened


class TwinLayer(nn.Module):
    """A layer with the exclusive vectors of all experts: what the kinds below have in common.

    `weight` (and `bias`, where there is one) are the shared expert's own parameters. `vectors` and
    `bias_vectors` are (experts, n); `B` (m, R) and `A` (R, n) the factors, `ranks` each expert's share of R.
    """

    weight: Tensor
    bias: Tensor | None
    vectors: Tensor | None
    bias_vectors: Tensor | None
    fused_weight: Tensor | None
    fused_bias: Tensor | None
    B: Tensor
    A: Tensor
    owner: Tensor
    is_matrix = False

    def __init__(self, layer: nn.Module, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__()
        self.fusion = fusion
        self.register_parameter("weight", layer._parameters["weight"])
        self.register_parameter("bias", layer._parameters.get("bias"))
        self._register_factors([e.factors.get(f"{name}.weight") for e in exclusive.values()])
        self._register_vectors("vectors", self.weight, [e.vectors.get(f"{name}.weight") for e in exclusive.values()])
        self._register_vectors("bias_vectors", self.bias, [e.vectors.get(f"{name}.bias") for e in exclusive.values()])
        self.register_buffer("fused_weight", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)
        fusion.layers.append(self)

    def _register_factors(self, factors: list[Factors | None]) -> None:
        kept = [f for f in factors if f is not None]
        self.ranks = tuple(0 if f is None else f.A.shape[0] for f in factors)
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        self.register_buffer("owner", owner.to(self.weight.device), persistent=False)
        if kept:
            self._keep(torch.cat([f.B for f in kept], dim=1), torch.cat([f.A for f in kept], dim=0))

    def _keep(self, B: Tensor, A: Tensor) -> None:
        """Hold all experts' factors, B (m, R) and A (R, n)."""
        self.register_buffer("B", B.to(self.weight), persistent=False)
        self.register_buffer("A", A.to(self.weight), persistent=False)

    def factors(self, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return B (m, r) and A (r, n) of the columns `used`, all R of them for None."""
        return (self.B, self.A) if used is None else (self.B[:, used], self.A[used])

    def _register_vectors(self, buffer: str, like: Tensor | None, vectors: list[Tensor | None]) -> None:
        stacked = None
        if like is not None and any(vector is not None for vector in vectors):
            zero = torch.zeros_like(like)
            stacked = torch.stack([zero if v is None else v.to(zero) for v in vectors])
        self.register_buffer(buffer, stacked, persistent=False)

    def fuse(self, weights: Tensor, bias_weights: Tensor) -> None:
        """Build the fused weight and bias for weights (experts,), in place from the shared ones."""
        if sum(self.ranks):
            scale = weights.to(self.weight)[self.owner]
            used = scale.nonzero().squeeze(1)
            B, A = self.factors(None if len(used) == len(scale) else used)
            if self.fused_weight is None:
                self.fused_weight = torch.empty_like(self.weight)
            torch.addmm(self.weight, B * scale[used], A, out=self.fused_weight)
        elif self.vectors is not None:
            self.fused_weight = self.weight + weights.to(self.vectors) @ self.vectors
        else:
            self.fused_weight = self.weight.detach()
        if self.bias is not None:
            self.fused_bias = self.bias.detach()
            if self.bias_vectors is not None:
                self.fused_bias = self.bias + bias_weights.to(self.bias_vectors) @ self.bias_vectors

    def joint_cost(self) -> float:
        """Return the least multiplications that a token's low-rank path takes, whatever its weights."""
        return float(sum(self.ranks) * sum(self.weight.shape))

    def row_columns(self, dims: int) -> Columns:
        """Return the columns in use and the rows' weights over them, (batch, 1, ..., r) with `dims` dimensions."""
        used, scale = self.fusion.columns(self.owner, self.ranks)
        return Columns(used, _spread(scale.to(self.weight), dims))

    def row_bias(self, dims: int) -> Tensor | None:
        """Return each row's bias, (batch, 1, ..., n) with `dims` dimensions, or (n,) where all share it."""
        if self.bias is None or self.bias_vectors is None:
            return self.bias
        weights = self.fusion.bias_weights
        assert weights is not None
        return _spread(torch.addmm(self.bias, weights.to(self.bias_vectors), self.bias_vectors), dims)

    def row_vector(self, dims: int) -> Tensor:
        """Return each row's 1-D weight, (batch, 1, ..., n) with `dims` dimensions, or (n,)."""
        if self.vectors is None:
            return self.weight
        weights = self.fusion.weights
        assert weights is not None
        return _spread(torch.addmm(self.weight, weights.to(self.vectors), self.vectors), dims)

    def current(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias that all rows share in the shared and fused modes."""
        if self.fusion.mode == "shared":
            return self.weight, self.bias
        assert self.fused_weight is not None
        return self.fused_weight, self.fused_bias


class TwinLinear(TwinLayer):
    """nn.Linear, weight (out, in).

    Where the experts have a joint basis it is what is held of them, and their factors are made of it when asked for.
    """

    is_matrix = True

    def _keep(self, B: Tensor, A: Tensor) -> None:
        """Hold all experts' factors, B (out, R) and A (R, in), or their joint basis.

        It is that of the factors as they come: rounded to half precision they would share nothing.
        """
        owner = self.owner.cpu()
        each = [owner == k for k, rank in enumerate(self.ranks) if rank]
        norms = [(B[:, own] @ A[own]).norm() for own in each] + [self.weight.detach().float().norm().cpu()]
        noise = ROUNDINGS * torch.finfo(torch.float32).eps * float(max(norms))
        joint = joint_basis(*self.flow(B, A), owner, self.fusion.experts, noise=noise)
        if joint is None:
            super()._keep(B, A)
            return
        for part, tensor in joint._asdict().items():
            self.register_buffer(f"basis_{part}", tensor.to(self.weight), persistent=False)

    @property
    def basis(self) -> JointBasis | None:
        """The experts' joint basis, where they have one."""
        if "basis_down" not in self._buffers:
            return None
        return JointBasis(*(self._buffers[f"basis_{part}"] for part in JointBasis._fields))  # type: ignore[arg-type]

    def factors(self, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return B (out, r) and A (r, in) of the columns `used`, all R of them for None."""
        if (basis := self.basis) is None:
            return super().factors(used)
        inner, outer = (basis.inner, basis.outer) if used is None else (basis.inner[:, used], basis.outer[used])
        return self.flow(basis.down @ inner, outer @ basis.up)

    def flow(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors as an input meets them, (in, R) and (R, out); and from these, the factors."""
        return A.T, B.T

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (batch, ..., out) of x (batch, ..., in): the layer without its exclusive vectors."""
        return F.linear(x, weight, bias)

    @by_row
    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, ..., out) of x (batch, ..., in)."""
        if self.fusion.mode != "rows":
            return self.plain(x, *self.current())
        shared_bias = self.bias is None or self.bias_vectors is None
        y = self.plain(x, self.weight, self.bias if shared_bias else None)
        if sum(self.ranks):
            z, up = self._through_factors(x)
            y.view(-1, y.shape[-1]).addmm_(z, up)
        bias = None if shared_bias else self.row_bias(x.ndim)
        return y if bias is None else y.add_(bias)

    def joint_cost(self) -> float:
        """Return the least multiplications that a token's low-rank path takes, whatever its weights."""
        if (basis := self.basis) is None:
            return super().joint_cost()
        return float(basis.down.numel() + basis.cores[0].numel() + basis.up.numel())

    def _through_factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (tokens, r) and `up` (r, out) whose product is what the rows' exclusive vectors add."""
        used, scale = self.row_columns(x.ndim)
        tokens, rows = x.shape[:-1].numel(), x.shape[0]
        if (basis := self.basis) is not None:
            columns = scale.shape[-1] * sum(self.weight.shape) * (1 + basis.down.shape[1] / tokens)
            if self.joint_cost() + basis.cores.numel() * rows / tokens < columns:
                assert self.fusion.weights is not None
                weights = self.fusion.weights.to(basis.cores)
                mixed = (weights @ basis.cores.flatten(1)).view(rows, *basis.cores.shape[1:])
                z = torch.bmm((x @ basis.down).view(rows, -1, mixed.shape[1]), mixed)
                return z.view(tokens, -1), basis.up
        down, up = self.flow(*self.factors(used))
        return ((x @ down) * scale).view(tokens, -1) if up.shape[0] else x.new_zeros(tokens, 0), up


class TwinConv1D(TwinLinear):
    """transformers' Conv1D (GPT-2), weight (in, out): y = x W + b with W = B A."""

    def flow(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors as an input meets them, (in, R) and (R, out); and from these, the factors."""
        return B, A

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (batch, ..., out) of x (batch, ..., in): the layer without its exclusive vectors."""
        y = x @ weight
        return y if bias is None else y.add_(bias)


class TwinEmbedding(TwinLayer):
    """nn.Embedding, weight (vocabulary, width).

    Only the rows that occur are fused, in every mode: a token costs R x width, a fused copy of the table
    would cost the vocabulary. Gemma's kind scales what it returns.
    """

    embed_scale: Tensor | None

    def __init__(self, layer: nn.Embedding, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__(layer, fusion, name, exclusive)
        self.padding_idx = layer.padding_idx
        scale = getattr(layer, "embed_scale", None)
        self.register_buffer("embed_scale", None if scale is None else torch.as_tensor(scale), persistent=False)

    def fuse(self, weights: Tensor, bias_weights: Tensor) -> None:
        """Keep the scale of the factors' columns; rows of the table are fused as they are read."""
        self.fused_weight = weights.to(self.A)[self.owner]

    def scale(self, dims: int) -> Tensor:
        """Return the weights over all the factors' columns: (R,), or each row's own with `dims` dimensions."""
        if self.fusion.mode == "fused":
            return self.current()[0]
        assert self.fusion.weights is not None
        return _spread(self.fusion.weights[:, self.owner].to(self.A), dims)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (batch, length, width) of token ids (batch, length)."""
        embedded = F.embedding(ids, self.weight)
        if self.fusion.mode != "shared" and len(self.owner):
            embedded = embedded + (F.embedding(ids, self.B) * self.scale(ids.ndim + 1)) @ self.A
        return embedded if self.embed_scale is None else embedded * self.embed_scale.to(embedded)


class TwinLayerNorm(TwinLayer):
    """nn.LayerNorm over the last dimension."""

    def __init__(self, layer: nn.LayerNorm, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__(layer, fusion, name, exclusive)
        self.normalized_shape, self.eps = layer.normalized_shape, layer.eps

    @by_row
    def forward(self, x: Tensor) -> Tensor:
        """Return x (batch, ..., n), normalised and scaled by each row's own weight and bias."""
        if self.fusion.mode != "rows":
            return F.layer_norm(x, self.normalized_shape, *self.current(), self.eps)
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps) * self.row_vector(x.ndim)
        bias = self.row_bias(x.ndim)
        return y if bias is None else y + bias


class TwinRMSNorm(TwinLayer):
    """Any norm with one weight (n,) that is multiplied in elementwise: Llama's, Qwen's, Gemma's, ...

    The layer itself runs, with the weight that holds at the moment in place of its own; broadcast, a row's
    weight serves its row.
    """

    def __init__(self, layer: nn.Module, fusion: Fusion, name: str, exclusive: Mapping[str, Exclusive]) -> None:
        super().__init__(layer, fusion, name, exclusive)
        del layer._parameters["weight"]
        self.layer = layer

    @by_row
    def forward(self, x: Tensor) -> Tensor:
        """Return x (batch, ..., n), normalised and scaled by each row's own weight."""
        self.layer.weight = self.current()[0].detach() if self.fusion.mode != "rows" else self.row_vector(x.ndim)
        normed: Tensor = self.layer(x)
        return normed


class TiedLinear(nn.Module):
    """An output layer whose weight is the embedding table: it is fused as the table is, from the same factors."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, table: TwinEmbedding) -> None:
        super().__init__()
        self.register_parameter("weight", layer._parameters["weight"])
        self.register_parameter("bias", layer._parameters["bias"])
        self._table = (table,)  # owned by the model; in a tuple, so it is not registered twice

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, ..., vocabulary) of x (batch, ..., width)."""
        (table,) = self._table
        y = F.linear(x, self.weight, self.bias)
        if table.fusion.mode == "shared" or not len(table.owner):
            return y
        return y + F.linear(F.linear(x, table.A) * table.scale(x.ndim), table.B)


TWINS: dict[type[nn.Module], type[TwinLayer]] = {
    nn.Linear: TwinLinear,
    Conv1D: TwinConv1D,
    nn.Embedding: TwinEmbedding,
    nn.LayerNorm: TwinLayerNorm,
}


def install(model: nn.Module, exclusive: Mapping[str, Exclusive]) -> Fusion:
    """Replace every layer of `model` that an expert changes with its twin; return what drives them.

    Args:
        model: a Hugging Face model that holds the shared expert; changed in place.
        exclusive: expert to exclusive vector, under `model`'s parameter names.

    Raises:
        InputError: a parameter that the model lacks, or in a layer that can't be fused per row.
    """
    fusion = Fusion(len(exclusive))
    changed = {name for e in exclusive.values() for name in (*e.factors, *e.vectors)}
    by_layer: dict[str, list[str]] = {}
    for name in sorted(changed):
        by_layer.setdefault(name.rpartition(".")[0], []).append(name)
    modules = dict(model.named_modules())
    tied = {id(layer.weight): path for path, layer in modules.items() if type(layer) is nn.Linear}
    for path, names in by_layer.items():
        layer = modules.get(path)
        if layer is None or any(name.rpartition(".")[2] not in layer._parameters for name in names):
            raise InputError(f"the model has no parameter {names[0]}, which an expert changes")
        kind = _twin_of(layer)
        if kind is None:
            known = ", ".join(known.__name__ for known in TWINS)
            raise InputError(f"{names[0]} belongs to a {type(layer).__name__}: twins fuse {known} and RMS norms")
        if "experts" in path.split("."):
            raise InputError(
                f"{names[0]} belongs to one expert of a mixture, which sees tokens without their rows; give experts "
                "that leave it as it is (adapters on attention, say)"
            )
        table = layer._parameters["weight"]
        twin = kind(layer, fusion, path, exclusive)
        model.set_submodule(path, twin)
        if isinstance(twin, TwinEmbedding) and id(table) in tied:
            output = tied[id(table)]
            model.set_submodule(output, TiedLinear(modules[output], twin))
    return fusion


def _twin_of(layer: nn.Module) -> type[TwinLayer] | None:
    """Return the twin of a layer's kind, None where there is none."""
    if type(layer) in TWINS:
        return TWINS[type(layer)]
    if isinstance(layer, nn.Embedding) and type(layer).__name__.endswith("ScaledWordEmbedding"):
        return TwinEmbedding
    parameters = layer._parameters.items()
    one_vector = [(name, weight.ndim) for name, weight in parameters if weight is not None]
    return TwinRMSNorm if one_vector == [("weight", 1)] and type(layer).__name__.endswith("RMSNorm") else None


def _spread(rows: Tensor, dims: int) -> Tensor:
    """Return (batch, n) as (batch, 1, ..., n) with `dims` dimensions."""
    return rows.view(rows.shape[0], *[1] * (dims - 2), rows.shape[1])
