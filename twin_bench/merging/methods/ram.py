"""RAM (Reinforced Agent Merging, 2026): the mean of an entry over the experts that changed it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.registry import merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="RAM", paper="arXiv:2601.13572", track="data-free")
def ram(vectors: TaskVectors, *, epsilon: float = 1e-5) -> Mapping[str, Tensor]:
    """theta_0 + sum_t [abs(tau_t) > epsilon] tau_t / max(1, the number of experts with abs(tau_t) > epsilon).

    What one expert alone changed is kept whole, and what several changed is averaged over those. This is mergekit's
    ram. The paper's RAM+, which also scales what one expert alone changed, is left out.
    """
    if epsilon < 0:
        raise InputError(f"ram: epsilon must be 0 or more, not {epsilon}")

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        count = torch.zeros_like(base)
        for tau in taus:
            changed = tau.abs() > epsilon
            tau.masked_fill_(~changed, 0.0)
            count += changed
        return base + taus.sum(dim=0) / count.clamp_(min=1)

    return vectors.merged(merge)
