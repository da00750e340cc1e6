"""Arrow (Ostapenko et al., 2024): each token of each LoRA layer goes to the adapters whose top direction it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from twin_bench.adaptive.smile import SmileLinear, added_bytes
from twin_bench.checkpoints.checkpoint import LowRank
from twin_bench.checkpoints.factors import Factors
from twin_bench.checkpoints.sources import Sources, load_model
from twin_bench.compat import Conv1D
from twin_bench.contenders import Contender, Context
from twin_bench.contenders.context import size
from twin_bench.contenders.storage import base_bytes, head_bytes
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.measured import Meter
from twin_bench.merging.linear_algebra import product_svd
from twin_bench.merging.registry import served_method
from twin_bench.twin.model import twin_class
from twin_bench.twin.parts import Parts


def check_experts(context: Context, *, top_k: int) -> None:
    """Raise an InputError unless top_k is at least 1, and UnsuitedError unless the experts are alike LoRA adapters."""
    if top_k < 1:
        raise InputError(f"arrow: top_k must be a whole number from 1, not {top_k}")
    require_alike_adapters(context.sources)


def require_alike_adapters(sources: Sources) -> None:
    """Raise UnsuitedError unless all experts are LoRA adapters of the same linear layers."""
    first, *others = sources.experts
    for name, expert in sources.experts.items():
        if not expert.low_rank:
            raise UnsuitedError(f"arrow routes among LoRA adapters, and expert {name!r} is a full checkpoint")
        for adapted in sorted(expert.low_rank.keys() & sources.skeleton.embeddings):
            raise UnsuitedError(f"arrow routes in linear layers, and expert {name!r} adapts the embeddings {adapted}")
    for name in others:
        for apart in sorted(sources.experts[first].low_rank.keys() ^ sources.experts[name].low_rank.keys()):
            raise UnsuitedError(f"arrow: experts {first!r} and {name!r} must adapt the same layers; {apart} is one's")


@served_method(title="Arrow", paper="arXiv:2405.11157", track="per-input", check_options=check_experts)
def arrow(context: Context, *, top_k: int = 3) -> Iterator[Contender]:
    """W_0 x + sum_t w_t(x) scale_t B_t A_t x in every adapted layer, w the softmax of the `top_k` largest |v_t^T x|.

    v_t is the top right singular vector of B_t A_t. Each token of each layer has weights of its own. Nothing is
    trained. What the adapters store beside factors (biases, whole modules) stays the base model's. If there are fewer
    experts than `top_k`, all are used.

    This is peft's create_arrow_model with its defaults, a top_k of 3 and a temperature of 1. Its singular vectors are
    those of 15 power iterations from a random start; here they are exact. The paper also builds its library of adapters
    by clustering tasks. On LoRA experts this is `smile` with a gate_rank of 1 and the adapters' rank.

    Raises UnsuitedError unless all experts are LoRA adapters of the same linear layers.
    """
    sources = context.sources
    require_alike_adapters(sources)
    with Meter(context.device) as meter:
        base = dict(sources.base.items())
        model = load_model(sources, base, context.dtype)
        added = install_arrow(model, {name: expert.low_rank for name, expert in sources.experts.items()}, top_k=top_k)
        parts = Parts(heads={task: expert.head() for task, expert in sources.experts.items() if sources.skeleton.head})
        twin = twin_class(context.task_type)(model, sources.tokenizer, parts, routing="none")
    stored = base_bytes(sources) + added_bytes(model, base) + head_bytes(sources)
    yield Contender(twin, context.names, meter.taken, size(base) + added, stored)


def install_arrow(model: nn.Module, adapters: Mapping[str, Mapping[str, LowRank]], *, top_k: int) -> int:
    """Replace every adapted layer of `model`. Return how many numbers the experts add.

    Args:
        model: holds the base model and is changed in place.
        adapters: expert to its LoRA factors by the name of a weight of `model`. All adapt the same weights.
        top_k: the number of experts for a token at most.
    """
    added = 0
    for name in next(iter(adapters.values())):
        path = name.removesuffix(".weight")
        layer: Any = model.get_submodule(path)
        factors = [_top_first(adapter[name], layer.weight.dtype) for adapter in adapters.values()]
        arrow = SmileLinear(
            layer.weight.T if type(layer) is Conv1D else layer.weight,
            layer.bias,
            factors,
            None,
            rank=max(len(lora.A) for lora in factors),
            gate_rank=1,
            top_k=min(top_k, len(factors)),
        )
        model.set_submodule(path, arrow)
        added += sum(tensor.numel() for tensor in arrow.added)
    return added


def _top_first(lora: LowRank, dtype: torch.dtype) -> Factors:
    """Return an adapter's product as the factors of its SVD, in `dtype` but in float32 or better."""
    exact = torch.promote_types(dtype, torch.float32)
    B, A = product_svd(lora.scale * lora.B().double(), lora.A().double())
    return Factors(B.to(exact), A.to(exact))
