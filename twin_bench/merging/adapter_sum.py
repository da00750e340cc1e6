"""The sum of LoRA experts as one LoRA adapter, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from twin_bench.checkpoints.checkpoint import Checkpoint
from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.skeleton import Skeleton
from twin_bench.errors import InputError, UnsuitedError


def merged_adapter(
    method: str, options: Mapping[str, Any], experts: Mapping[str, Checkpoint], skeleton: Skeleton
) -> dict[str, Factors]:
    """Return c sum_t s_t B_t A_t of every adapted matrix as one product: [c s_1 B_1 ... c s_T B_T] [A_1; ...; A_T].

    Nothing is truncated: the rank is the sum of the experts' ranks. c is the coefficient of every task vector:
    `scaling` under task_arithmetic, 1/T under average. It does not depend on how many experts adapt a matrix.

    Args:
        method: the merge method's name.
        options: all options of the method.
        experts: PEFT adapters on one base model.
        skeleton: the base model's skeleton.

    Returns:
        Factors by parameter name, in the parameter's own orientation, in float32 or better.

    Raises:
        InputError: the method does not sum task vectors.
        UnsuitedError: an expert changes more than a LoRA adapter can express.
    """
    coefficients = {"average": 1 / len(experts), "task_arithmetic": options.get("scaling")}
    if method not in coefficients:
        raise InputError(
            f"as_adapter: {method} does not sum task vectors, so its result has no low rank; use one of "
            f"{', '.join(coefficients)}, or leave as_adapter out"
        )
    for task, expert in experts.items():
        if not expert.low_rank:
            raise UnsuitedError(
                f"as_adapter: expert {task!r} is not a LoRA adapter ({expert.source}); leave as_adapter out"
            )
        replaced = expert.replaced - expert.low_rank.keys()  # PEFT saves adapted embeddings beside their factors
        if replaced:
            raise UnsuitedError(
                f"as_adapter: expert {task!r} replaces all of {min(replaced)}, which a LoRA adapter cannot "
                "express; leave as_adapter out"
            )
    return {
        name: _summed(name, coefficients[method], experts)
        for name in skeleton.backbone
        if any(name in expert.low_rank for expert in experts.values())
    }


def _summed(name: str, coefficient: Any, experts: Mapping[str, Checkpoint]) -> Factors:
    adapters = [expert.low_rank[name] for expert in experts.values() if name in expert.low_rank]
    exact = torch.promote_types(adapters[0].A().dtype, torch.float32)
    A = torch.cat([lora.A().to(exact) for lora in adapters])
    B = torch.cat([coefficient * lora.scale * lora.B().to(exact) for lora in adapters], dim=1)
    return Factors(A.T, B.T) if adapters[0].transposed else Factors(B, A)
