"""Fisher merging (Matena and Raffel, 2022): an average weighted by each expert's Fisher information."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.registry import Statistics, merge_method
from twin_bench.merging.statistics import statistics_of
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(
    title="Fisher merging",
    paper="arXiv:2111.09832",
    track="calibration",
    needs=("training inputs", "gradients", "seed"),
    statistics="fisher",
)
def fisher(vectors: TaskVectors, *, statistics: Statistics, floor: float = 1e-6) -> Mapping[str, Tensor]:
    """theta_0 + sum_t c_t (F_t + floor) tau_t / sum_t c_t (F_t + floor), entry by entry; c_t = 1 / (norm F_t + floor).

    `statistics[t][name]` is F_t, the diagonal of expert t's Fisher information in the parameter's shape (see
    `twin_bench.merging.calibration.fisher_diagonals`). The norm is L2 over the whole model, so that no expert wins by
    the scale of its gradients alone. The average of task vectors gives the same result as the average of experts.

    The floor is *added*, also to the norm, as in the code of RegMean's authors, MergeLM and FusionBench. The authors of
    Fisher merging take max(F_t, floor), for the first model alone, and a norm without a floor. Their paper also
    searches c_t on validation rows; here c_t depends on the norm alone. Where the Fisher is far below the floor, the
    result is the experts' average weighted by c_t.

    Raises InputError unless floor > 0, and for statistics that lack a parameter, have another shape, or hold a negative
    or non-finite number.
    """
    if not floor > 0:
        raise InputError(f"fisher: floor must be above 0, not {floor}; it decides where no expert has information")
    squares = torch.zeros(len(vectors.experts), dtype=torch.float64)
    for name in vectors:
        if vectors.base[name].is_floating_point():
            diagonals = _diagonals(vectors, statistics, name)
            squares += diagonals.view(len(diagonals), vectors.base[name].numel()).double().square().sum(dim=1).cpu()
    c = 1 / (squares.sqrt() + floor)
    c = c / c.sum()

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        weights = (_diagonals(vectors, statistics, name) + floor) * c.to(taus).view(-1, *[1] * base.ndim)
        return base + (weights * taus).sum(dim=0) / weights.sum(dim=0)

    return vectors.merged(merge)


def _diagonals(vectors: TaskVectors, statistics: Statistics, name: str) -> Tensor:
    """Return the experts' Fisher diagonals for a parameter: (T, *shape)."""
    base = vectors.base[name]
    exact = torch.promote_types(base.dtype, torch.float32)
    own = (statistics_of("fisher", statistics, task, name, base.shape, base.device) for task in vectors.experts)
    stacked = torch.stack([diagonal.to(exact) for diagonal in own])
    if (stacked < 0).any():
        raise InputError(f"fisher: the statistics of {name} hold a negative number; a Fisher diagonal has none")
    return stacked
