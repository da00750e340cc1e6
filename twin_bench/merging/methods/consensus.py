"""Consensus merging (Wang et al., 2024): task arithmetic on the entries that several tasks' TALL masks share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from twin_bench.errors import InputError, UnsuitedError
from twin_bench.merging.methods.task_arithmetic import task_arithmetic
from twin_bench.merging.registry import SCALINGS, merge_method
from twin_bench.merging.task_vectors import TaskVectors


@merge_method(title="Consensus (TALL masks)", paper="arXiv:2405.07813", track="data-free", tune=SCALINGS)
def consensus(
    vectors: TaskVectors, *, scaling: float = 0.3, mask_lambda: float = 0.4, min_tasks: int = 2
) -> Mapping[str, Tensor]:
    """theta_0 + scaling * m * sum_t tau_t, m 1 where at least `min_tasks` of the masks m_t hold, else 0.

    m_t = [abs(tau_t) > mask_lambda * abs(sum_u tau_u - tau_t)]. With mask_lambda 1 it holds where the merged entry is
    nearer to the expert's entry than the base's entry is. With min_tasks 2, entries that no mask holds ("catastrophic")
    or only one ("selfish") go back to the base's. With min_tasks 0 this is task arithmetic.

    The masks are computed from the unscaled sum, as in the authors' code. The authors choose mask_lambda on validation
    rows, for each task from 0.2 to 0.6. Here it is one value for all tasks, by default the middle of that range. The
    authors choose `scaling` on validation rows as well. They also mask TIES' task vector, which is not done here.

    Raises InputError unless min_tasks is a whole number of at least 0 and mask_lambda is at least 0. Raises
    UnsuitedError if there are fewer experts than min_tasks.
    """
    if min_tasks < 0 or min_tasks % 1:
        raise InputError(f"consensus: min_tasks must be a whole number of at least 0, not {min_tasks}")
    if not mask_lambda >= 0:
        raise InputError(f"consensus: mask_lambda must be at least 0, not {mask_lambda}")
    if len(vectors.experts) < min_tasks:
        raise UnsuitedError(f"consensus: {min_tasks} tasks must agree and there are {len(vectors.experts)}")

    def share(name: str, taus: Tensor) -> Tensor:
        together = taus.sum(dim=0)
        votes = torch.zeros_like(together, dtype=torch.int32)
        for tau in taus:
            votes += tall_mask(tau, together, mask_lambda)
        return taus.masked_fill_(votes < min_tasks, 0.0)

    return task_arithmetic(vectors.map(share), scaling=scaling)


def tall_mask(tau: Tensor, together: Tensor, mask_lambda: float) -> Tensor:
    """Return a mask of the entries where tau outweighs lambda times the other experts' part of the sum `together`."""
    return tau.abs() > (together - tau).abs_().mul_(mask_lambda)
