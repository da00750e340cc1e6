"""PCB-Merging (Du et al., 2024): a mean of task vectors, weighted by competition within and between tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from twin_bench.merging.order_statistics import kth_largest
from twin_bench.merging.registry import SCALINGS, merge_method, require_fraction
from twin_bench.merging.task_vectors import TaskVectors

CLIPPED = 1e-4
"""The fraction of magnitudes that is clipped at each end, as in the authors' code."""


@merge_method(title="PCB-Merging", paper="arXiv:2410.02396", track="data-free", tune=SCALINGS)
def pcb(vectors: TaskVectors, *, scaling: float = 1.0, density: float = 0.1) -> Mapping[str, Tensor]:
    """theta_0 + scaling * sum_t b_t c_t / sum_t b_t, b_t from an entry's weight in its own task and its agreement.

    c_t is tau_t with its magnitudes clipped to their 0.01% and 99.99% quantiles. With norm(x) = (x - min x) / (max x -
    min x),

        s_t = exp(T norm(abs(c_t))^2) * tanh(tau_t * sum_u tau_u),    b_t = norm(max(s_t, q_t)).

    The fraction `density` of s_t exceeds the quantile q_t, and the rest is dropped. Quantiles and extremes are those of
    one task *over the whole model*. If all b_t are 0 the entry is the base's.

    This is the authors' code (pcb-merging.py, with its default density). Their vision script has density 0.05 and
    scaling 1.2, and their language runs search scaling from 0.8 to 2.2. The paper writes a softmax over entries instead
    of exp, and a sum over u of softmaxes of tau_t * tau_u instead of tanh. A pcb.py in mergekit's history follows the
    paper, per tensor.

    Raises InputError unless 0 < density <= 1.
    """
    require_fraction("pcb", "density", density)
    count = len(vectors.experts)
    total = sum(vectors.base[name].numel() for name in vectors.floating())
    low, high = kth_largest(
        vectors.map(lambda name, taus: taus.abs_()),
        total - int(total * CLIPPED),
        total - max(0, int(total * (1 - CLIPPED) - 1)),
    )

    def scores(taus: Tensor) -> Iterator[Tensor]:
        together = taus.sum(dim=0)
        for t, tau in enumerate(taus):
            within = _norm_(tau.abs().clamp_(low[t], high[t]), low[t], high[t])
            # exp(T (x - 1)): the common factor exp(T) cancels in norm and would overflow for many experts
            yield within.square_().sub_(1).mul_(count).exp_().mul_((tau * together).tanh_())

    def scored(name: str, taus: Tensor) -> Tensor:
        for tau, score in zip(taus, scores(taus), strict=True):  # a score needs no more than the others' sum
            tau.copy_(score)
        return taus

    threshold, best = kth_largest(vectors.map(scored), max(1, total - int(total * (1 - density))), 1)

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        weighted, weights = torch.zeros_like(base), torch.zeros_like(base)
        for t, weight in enumerate(scores(taus)):
            weights += _norm_(weight, threshold[t], best[t]).clamp_(min=0)
            weighted += weight.mul_(taus[t].sign()).mul_(taus[t].abs_().clamp_(low[t], high[t]))
        return weighted.mul_(scaling).div_(weights.clamp_(min=1e-12)).add_(base)

    return vectors.merged(merge)


def _norm_(entries: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return (entries - low) / (high - low), in place. It is 0 if low equals high: all entries are then equal."""
    return entries.sub_(low).div_((high - low).clamp(min=torch.finfo(torch.float32).tiny))
