"""The protocol paper: the rank of exclusive vectors in the authors' code, and its arithmetic for LoRA experts.

Rank: the authors compute int((1 - rate) * min(m, n)) in floating point, where rate = 1 - density is the fraction that
is dropped. At rate 0.9, 1 - rate is 0.09999999999999998, and the rank is one lower than density * min(m, n) where
min(m, n) is a multiple of 10. `authors_rank` reproduces that. A twin stores exclusive vectors of the exact rank, and
the protocol paper leaves out the last direction.

LoRA experts: the authors' code merges, truncates and fuses A and B separately. W(x) = W_0 + s B(x) A(x) with A(x) =
A_s + sum_t w_t(x) v^A_t. A_s is the merge of all A_t, and v^A_t is the truncated SVD of A_t - A_s. B(x) is computed in
the same way.

This differs from the paper's text, which fuses delta W = s B A. The product has cross terms between experts, and the
shared expert's lambda is squared. Only the protocol paper computes this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twin_bench.checkpoints.checkpoint import Checkpoint
from twin_bench.checkpoints.factors import Factors
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.exclusive.kinds.svd import exclusive_rank
from twin_bench.twin.fusion import Fusion
from twin_bench.twin.layers import by_row
from twin_bench.twin.layers.base import overwritable
from twin_bench.twin.placement import require_in_memory


def authors_rank(shape: torch.Size, density: float) -> int:
    """Return int((1 - rate) * min(m, n)) as the authors' code computes it, for the rate that 1 - density is written as.

    It is int(density * min(m, n)), or one less: 31 and not 32 for density 0.1 and 320.
    """
    rate = round(1 - density, 12)
    return int((1 - rate) * min(shape))


def at_authors_ranks(exclusive: Mapping[str, Exclusive], density: float) -> dict[str, Exclusive]:
    """Return exclusive vectors of `density` cut to the authors' ranks. The last columns have the smallest values."""
    return {
        task: Exclusive(
            {
                name: Factors(B[:, :rank], A[:rank])
                for name, (B, A) in own.factors.items()
                if (rank := authors_rank(torch.Size((len(B), A.shape[1])), density))
            },
            own.vectors,
        )
        for task, own in exclusive.items()
    }


def with_all_biases(
    exclusive: Mapping[str, Exclusive], left_out: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Exclusive]:
    """Return exclusive vectors with the biases that they leave out below a layer."""
    return {task: replace(own, vectors={**own.vectors, **left_out.get(task, {})}) for task, own in exclusive.items()}


class AdapterStack(NamedTuple):
    """One matrix's LoRA adapters of all T experts: A (T, r, n) and B (T, m, r) in the experts' order.

    `scale` multiplies every B A.
    """

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class PaperFactors:
    """The experts' LoRA factors by parameter name, with the settings by which the authors merge and truncate them.

    `scaling` is the lambda of task arithmetic. Of `density` and `rank`, which limit the rank of exclusive vectors, one
    is None.
    """

    adapters: Mapping[str, AdapterStack]
    scaling: float
    density: float | None
    rank: int | None


def stack_adapters(experts: Mapping[str, Checkpoint]) -> dict[str, AdapterStack]:
    """Return the stacked adapters of all experts, by parameter name, in float32.

    Raises:
        UnsuitedError: An expert is not a pure LoRA adapter, or the experts' adapters differ in rank, scale or matrices.
            Factors of different shapes can't be added.
    """
    first = next(iter(experts.values()))
    stacks: dict[str, AdapterStack] = {}
    for task, expert in experts.items():
        if not expert.low_rank or expert.replaced or expert.low_rank.keys() != first.low_rank.keys():
            raise UnsuitedError(
                f"expert {task!r}: protocol paper adds A and B of LoRA adapters; it needs adapters on the same "
                "matrices, and nothing else trained"
            )
    for name, lora in first.low_rank.items():
        own = [expert.low_rank[name] for expert in experts.values()]
        A, B = [pair.A().float() for pair in own], [pair.B().float() for pair in own]
        if len({(a.shape, pair.scale) for a, pair in zip(A, own, strict=True)}) > 1:
            raise UnsuitedError(f"tensor {name}: the adapters differ in rank or scale; protocol paper can't add them")
        stacks[name] = AdapterStack(torch.stack(A), torch.stack(B), lora.scale)
    return stacks


def merge_lora_factors(
    method: str, base: Checkpoint, experts: Mapping[str, Checkpoint], **options: Any
) -> dict[str, Tensor]:
    """Return the parameters of a static merge as the authors compute it: `method` merges all A and all B separately.

    The result is W_0 + s B A in W_0's dtype. Raises UnsuitedError as `stack_adapters` does.
    """
    stacks = stack_adapters(experts)
    zeros = {key: torch.zeros_like(tensor[0]) for key, tensor in _sides(stacks).items()}
    own = {task: {key: tensor[t] for key, tensor in _sides(stacks).items()} for t, task in enumerate(experts)}
    merged = merge_lazily(method, zeros, own, **options)
    parameters = dict(base.items())
    for name, stack in stacks.items():
        adapter = next(iter(experts.values())).low_rank[name]
        delta = adapter.oriented(stack.scale * merged[f"{name}.B"] @ merged[f"{name}.A"])
        parameters[name] = (parameters[name].float() + delta).to(parameters[name].dtype)
    return parameters


def install_paper_layers(model: nn.Module, parts: PaperFactors) -> Fusion:
    """Replace the adapted layers of `model` by PaperLinear layers, and return the Fusion that controls them.

    `model` holds the shared expert theta_s = theta_0 + lambda sum_t tau_t. The layers subtract the task vectors to
    recover theta_0. Raises InputError for an adapted layer that is not nn.Linear, and for offloaded weights.
    """
    require_in_memory(model)
    experts = len(next(iter(parts.adapters.values())).A)
    fusion = Fusion(experts)
    modules = dict(model.named_modules())
    for name, stack in parts.adapters.items():
        path = name.removesuffix(".weight")
        layer = modules.get(path)
        if type(layer) is not nn.Linear:
            raise InputError(f"{name} belongs to a {type(layer).__name__}; protocol paper adapts Linear layers only")
        model.set_submodule(path, PaperLinear(layer, fusion, stack, parts))
    return fusion


class PaperLinear(nn.Module):
    """nn.Linear under the protocol paper: y = W_0 x + s B(x) A(x) x.

    `A` (1 + T, r, n) and `B` (1 + T, m, r) hold the shared factors at index 0, then the T exclusive vectors.
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    fused_weight: Tensor | None
    owner: Tensor
    is_matrix = True
    fusible: ClassVar[bool] = True

    def __init__(self, layer: nn.Linear, fusion: Fusion, stack: AdapterStack, parts: PaperFactors) -> None:
        super().__init__()
        self.fusion, self.scale = fusion, stack.scale
        self.ranks = (2 * stack.A.shape[1],) * len(stack.A)
        merged = parts.scaling * stack.scale * torch.einsum("tmr,trn->mn", stack.B, stack.A)
        pretrained = (layer.weight.float() - merged.to(layer.weight.device)).to(layer.weight.dtype)
        self.register_parameter("weight", nn.Parameter(pretrained, requires_grad=False))
        self.register_parameter("bias", layer.bias)
        # Other layers' factors are not in the state dict. These are, because the shared expert depends on them.
        for side, tensors in (("A", stack.A), ("B", stack.B)):
            self.register_buffer(side, _shared_and_exclusive(tensors, parts).to(layer.weight))
        owner = torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))
        self.register_buffer("owner", owner.to(self.weight.device), persistent=False)
        self.register_buffer("fused_weight", None, persistent=False)
        fusion.layers.append(self)

    def fuse(self, weights: Tensor, bias_weights: Tensor) -> None:
        """Compute the fused weight for weights (experts,). Experts of this protocol do not change biases."""
        share = _with_shared(weights).to(self.A)
        A, B = torch.einsum("t,trn->rn", share, self.A), torch.einsum("t,tmr->mr", share, self.B)
        self.fused_weight = overwritable(self.fused_weight, self.weight)
        torch.addmm(self.weight, self.scale * B, A, out=self.fused_weight)

    def fuse_cost(self, expert: int) -> float:
        """Return what adding an expert's factors to the weight costs, in multiplications of a plain token."""
        return float(self.ranks[expert] * self.weight.numel())

    def row_cost(self, expert: int) -> float:
        """Return the multiplications that an expert's factors cost a token whose row has weights of its own."""
        return float(self.ranks[expert] * sum(self.weight.shape))

    def joint_cost(self) -> float:
        """Return the multiplications that a token's factors cost, for any weights."""
        return float(self.A.numel() + self.B.numel())

    @by_row
    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, ..., m) for x (batch, ..., n)."""
        if self.fusion.mode == "fused":
            assert self.fused_weight is not None
            return F.linear(x, self.fused_weight, self.bias)
        weights = self.fusion.weights if self.fusion.mode == "rows" else x.new_zeros(1, self.fusion.experts)
        assert weights is not None
        share = _with_shared(weights).to(x)
        share = share.view(len(share), *[1] * (x.ndim - 2), -1, 1)  # (batch, 1, ..., 1 + T, 1)
        count, rank = self.A.shape[:2]
        reduced = (F.linear(x, self.A.flatten(0, 1)).unflatten(-1, (count, rank)) * share).sum(dim=-2)
        spread = (reduced.unsqueeze(-2) * share).flatten(-2)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(spread, self.B.transpose(0, 1).flatten(1))


def _shared_and_exclusive(tensors: Tensor, parts: PaperFactors) -> Tensor:
    """Return the shared factor S = lambda sum_t X_t and every SVD_r(X_t - S), (1 + T, p, q), for factors (T, p, q)."""
    shared = parts.scaling * tensors.sum(dim=0)
    if parts.density is None:
        rank = exclusive_rank(shared.shape, rank=parts.rank)
    else:
        rank = authors_rank(shared.shape, parts.density)
    kept = [torch.zeros_like(shared)] * len(tensors)
    if rank:
        factors = [truncated_svd(tensor - shared, rank) for tensor in tensors]
        kept = [B @ A for B, A in factors]
    return torch.stack([shared, *kept])


def _with_shared(weights: Tensor) -> Tensor:
    """Return weights (..., T) with the shared factor's weight 1 in front, (..., 1 + T)."""
    return torch.cat([torch.ones_like(weights[..., :1]), weights], dim=-1)


def _sides(stacks: Mapping[str, AdapterStack]) -> dict[str, Tensor]:
    """Return all stacked factors as tensors of their own, named NAME.A and NAME.B."""
    return {f"{name}.{side}": getattr(stack, side) for name, stack in stacks.items() for side in ("A", "B")}
