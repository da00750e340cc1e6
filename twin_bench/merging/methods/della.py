"""DELLA (Deep et al., 2024): drop small entries more often than large ones, rescale, then elect and fuse as in TIES."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.drawing import draws
from twin_bench.merging.methods.ties import ties
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="DELLA", paper="arXiv:2406.11617", track="data-free", needs=("seed",), tune=SCALINGS)
def della(
    vectors: TaskVectors, *, scaling: float = 1.0, density: float = 0.3, epsilon: float = 0.15, seed: int = 0
) -> Mapping[str, Tensor]:
    """theta_0 + scaling * disjoint_mean_t(tau_t * Bernoulli(p_t) / p_t), p_t growing with an entry's rank in its row.

    A row is a matrix's last axis, or all of a vector. Its entries are kept with probabilities that rise linearly, from
    density - epsilon for the smallest magnitude to density + epsilon for the largest. This is the authors' code with a
    window_size of 2 epsilon. The paper divides by n where the code divides by n - 1. A row of one entry is kept with
    probability `density`. Kept entries are divided by their probability, as in the paper and the code; today's mergekit
    restores the tensor's norm instead. The sign election is that of TIES. If a sum is exactly 0 the entry is dropped
    here, while the authors' code and mergekit elect +. With epsilon 0 this is DARE + TIES, draw by draw. The authors
    give no defaults; these are DARE's and mergekit's.

    Raises InputError unless 0 < density <= 1, epsilon >= 0 and density +- epsilon is in (0, 1].
    """
    require_fraction("della", "density", density)
    if not (epsilon >= 0 and density - epsilon > 0 and density + epsilon <= 1):
        raise InputError(
            f"della: density - epsilon and density + epsilon must be in (0, 1] and epsilon at least 0, "
            f"not density {density} and epsilon {epsilon}"
        )

    def drop(name: str, taus: Tensor) -> Tensor:
        for task, tau in zip(vectors.experts, taus, strict=True):
            keep = keep_probabilities(tau, density, epsilon)
            tau.div_(keep).masked_fill_(draws(seed, task, name, tau.shape).to(tau.device) >= keep, 0.0)
        return taus

    return ties(vectors.map(drop), scaling=scaling, density=1.0)


def keep_probabilities(tau: Tensor, density: float, epsilon: float) -> Tensor:
    """Return each entry's probability of being kept. It is linear in the rank of its magnitude in its row.

    Equal magnitudes are ranked by position.
    """
    if not tau.numel():
        return torch.empty_like(tau)
    rows = tau.reshape(-1, tau.shape[-1] if tau.ndim else 1)
    length = rows.shape[1]
    ladder = torch.linspace(density - epsilon, density + epsilon, length, dtype=tau.dtype, device=tau.device)
    if length == 1:
        ladder.fill_(density)
    order = rows.abs().argsort(dim=1, stable=True)
    return torch.empty_like(rows).scatter_(1, order, ladder.expand_as(rows)).view(tau.shape)
