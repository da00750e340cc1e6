"""theta_s + sum_t w_t v_t of one parameter after the other, without a model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from twin_bench.checkpoints.factors import Factors
from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive

Weighted = Sequence[tuple[float, Exclusive]]
"""The experts that have a weight, each with its exclusive vector."""


def weighted(exclusive: Mapping[str, Exclusive], weights: Tensor) -> Weighted:
    """Return the exclusive vectors that have a weight other than 0. `weights` is (experts,)."""
    pairs = zip(weights.tolist(), exclusive.values(), strict=True)
    return [(weight, own) for weight, own in pairs if weight]


def require_present(experts: Weighted, names: Iterable[str]) -> None:
    """Raise an InputError for a parameter that an expert changes and that is not among `names`."""
    known = set(names)
    for _, own in experts:
        for name in own.names():
            if name not in known:
                raise InputError(f"model/ has no parameter {name}, which an expert changes; build the twin again")


def fused(name: str, shared: Tensor, experts: Weighted) -> Tensor:
    """Return one parameter fused, in float32 or better. `shared` is theta_s, and is not changed."""
    total = shared.to(torch.promote_types(shared.dtype, torch.float32), copy=True)
    for weight, own in experts:
        if name in own.factors:
            B, A = own.factors[name]
            total.addmm_(B.to(total), A.to(total), alpha=weight)
        elif name in own.sparse:
            own.sparse[name].add_to(total, weight)
        elif name in own.vectors:
            total.add_(own.vectors[name].to(total), alpha=weight)
    return total


def summed(name: str, experts: Weighted) -> Factors:
    """Return the factors of sum_t w_t B_t A_t, [w_1 B_1 ... w_T B_T] [A_1; ...; A_T], of the experts that have some."""
    pairs = [(weight, own.factors[name]) for weight, own in experts if name in own.factors]
    if len(pairs) == 1 and pairs[0][0] == 1:
        return pairs[0][1]
    return Factors(
        torch.cat([weight * B for weight, (B, _) in pairs], dim=1), torch.cat([A for _, (_, A) in pairs], dim=0)
    )
