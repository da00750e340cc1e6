"""PCB-Merging (Du et al., 2024): a mean of task vectors, each entry weighed by how it competes within and across."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.methods import merge_method, require_fraction
from twin_bench.methods.ties import kth_largest
from twin_bench.task_vectors import TaskVectors

CLIPPED = 1e-4
"""The fraction of magnitudes clipped at either end, the authors'."""


@merge_method(title="PCB-Merging", paper="arXiv:2410.02396", track="data-free")
def pcb(vectors: TaskVectors, *, scaling: float = 1.0, density: float = 0.1) -> Mapping[str, Tensor]:
    """theta_0 + scaling * sum_t b_t c_t / sum_t b_t, b_t from an entry's weight in its own task and its agreement.

    c_t is tau_t with its magnitudes clipped to their 0.01% and 99.99% quantiles, and with norm(x) =
    (x - min x) / (max x - min x), quantiles and extremes of one task *over the whole model*,

        s_t = exp(T norm(abs(c_t))^2) * tanh(tau_t * sum_u tau_u),    b_t = norm(max(s_t, q_t)),

    q_t the quantile that the fraction `density` of s_t exceeds: the rest is dropped. Where all b_t are 0 the
    entry is the base's. This is the authors' code (pcb-merging.py, its default density; their vision script has
    density 0.05 and scaling 1.2, and their language runs search scaling from 0.8 to 2.2). The paper writes softmax
    over entries for exp and a sum over u of softmaxes of tau_t * tau_u for tanh, which a pcb.py in mergekit's history
    follows, per tensor.

    Raises InputError unless 0 < density <= 1.
    """
    require_fraction("pcb", "density", density)
    count = len(vectors.experts)
    total = sum(vectors.base[name].numel() for name in vectors.floating())
    magnitudes = vectors.map(lambda name, taus: taus.abs())
    lowest = kth_largest(magnitudes, total - int(total * CLIPPED))
    highest = kth_largest(magnitudes, total - max(0, int(total * (1 - CLIPPED) - 1)))

    def clipped(taus: Tensor) -> Tensor:
        return taus.abs().clamp(_spread(lowest, taus), _spread(highest, taus))

    def score(name: str, taus: Tensor) -> Tensor:
        within = _span(clipped(taus), lowest, highest).square()
        # exp(T (x - 1)): the common factor exp(T) cancels in norm and would overflow for many experts
        return torch.exp(count * (within - 1)) * torch.tanh(taus * taus.sum(dim=0))

    scores = vectors.map(score)
    threshold = kth_largest(scores, max(1, total - int(total * (1 - density))))
    best = kth_largest(scores, 1)

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        weights = _span(score(name, taus), threshold, best).clamp(min=0)
        weighted = (weights * taus.sign() * clipped(taus)).sum(dim=0)
        return base + scaling * weighted / weights.sum(dim=0).clamp(min=1e-12)

    return vectors.merged(merge)


def _span(entries: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return (entries - low) / (high - low) of each expert's entries (T, *shape); 0 where high is low."""
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    return (entries - _spread(low, entries)) / _spread(width, entries)


def _spread(numbers: Tensor, entries: Tensor) -> Tensor:
    return numbers.to(entries.dtype).view(-1, *[1] * (entries.ndim - 1))
