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
    """Task arithmetic on the entries where at least `min_tasks` of the masks m_t hold.

    m_t = [abs(tau_t) > mask_lambda * abs(sum_u tau_u - tau_t)]: the merged entry is nearer to the expert's than
    the base's is, up to lambda. Entries that no mask holds ("catastrophic") or only one ("selfish") go back to
    the base's; min_tasks 0 is task arithmetic. As in the authors' code, masks from the unscaled sum, but for lambda:
    they choose it on validation rows, for each task from 0.2 to 0.6; here it is one for all, by default the middle of
    those. `scaling` they choose likewise. They mask TIES' task vector as well, which is not done here.

    Raises InputError unless min_tasks is a whole number of at least 0 and mask_lambda at least 0, and UnsuitedError
    where there are fewer experts than min_tasks.
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
    """Return which entries of a task vector outweigh lambda times what the others add to their sum `together`."""
    return tau.abs() > (together - tau).abs_().mul_(mask_lambda)
