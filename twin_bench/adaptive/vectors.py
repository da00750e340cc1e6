"""Whole task vectors in the form that twins take, without truncation."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from twin_bench.checkpoints.checkpoint import Checkpoint
from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.contenders.context import size
from twin_bench.contenders.storage import bytes_of
from twin_bench.errors import InputError
from twin_bench.twin.exclusive import Exclusive


def whole_task_vector(expert: Checkpoint, base: Mapping[str, Tensor], skeleton: Skeleton) -> Exclusive:
    """Return tau_t as an exclusive vector that is not truncated.

    A LoRA delta keeps its own factors. Any other matrix (m, n) becomes the product of itself and an identity matrix of
    its shorter side.

    Raises InputError if a tensor of three or more dimensions differs from the base model's.
    """
    factors: dict[str, Factors] = {}
    vectors: dict[str, Tensor] = {}
    for name in skeleton.backbone:
        if name in expert.low_rank:
            lora = expert.low_rank[name]
            A, B = lora.A().float(), lora.scale * lora.B().float()
            factors[name] = Factors(A.T.contiguous(), B.T.contiguous()) if lora.transposed else Factors(B, A)
            continue
        exact = torch.promote_types(base[name].dtype, torch.float32)
        tau = expert[name].to(exact) - base[name].to(exact)
        if not tau.any():
            continue
        if tau.ndim == 1:
            vectors[name] = tau
        elif tau.ndim == 2:
            tall = tau.shape[0] >= tau.shape[1]
            identity = torch.eye(min(tau.shape), dtype=tau.dtype)
            factors[name] = Factors(tau, identity) if tall else Factors(identity, tau)
        else:
            raise InputError(f"tensor {name} has {tau.ndim} dimensions: a twin fuses matrices and vectors")
    return Exclusive(factors, vectors)


def part_of(vector: Exclusive, names: Container[str]) -> Exclusive:
    """Return the part of a task vector for the parameters `names`."""
    return Exclusive(
        {name: pair for name, pair in vector.factors.items() if name in names},
        {name: tensor for name, tensor in vector.vectors.items() if name in names},
    )


def stored_numbers(vector: Exclusive) -> int:
    """Return how many numbers a task vector stores. A matrix counts as its factors or whole, whichever is smaller."""
    factors = sum(min(B.numel() + A.numel(), len(B) * A.shape[1]) for B, A in vector.factors.values())
    return factors + size(vector.vectors)


def stored_bytes(vector: Exclusive) -> int:
    """Return how many bytes a task vector stores, in the dtypes that it has. A matrix counts as in `stored_numbers`."""
    pairs = vector.factors.values()
    factors = sum(min(B.nbytes + A.nbytes, len(B) * A.shape[1] * B.element_size()) for B, A in pairs)
    return factors + bytes_of(vector.vectors.values())
