"""EMR-Merging (Huang et al., 2024): elect one unified task vector, then mask and rescale it for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twin_bench.merging.registry import merge_method
from twin_bench.merging.task_vectors import TaskVectors


def stored_bytes(shapes: Sequence[torch.Size], experts: int, itemsize: int) -> int:
    """Return how many bytes are stored: theta_0, tau_uni, and a mask and a scale for each expert.

    theta_0 and tau_uni are both needed, because a mask acts on tau_uni alone. A mask takes one bit for each parameter,
    and is filled up to whole numbers of `itemsize` bytes.
    """
    parameters = sum(shape.numel() for shape in shapes)
    masks = experts * math.ceil(parameters / (8 * itemsize))
    return itemsize * (2 * parameters + masks + experts)


@merge_method(
    title="EMR-Merging",
    paper="arXiv:2405.17461",
    track="task-id given",
    needs=("the task of each input",),
    stored=stored_bytes,
)
def emr(vectors: TaskVectors, *, task: str) -> Mapping[str, Tensor]:
    """theta_0 + scale_t * mask_t * tau_uni, the parameters of task t.

    sigma = sign(sum_t tau_t). tau_uni = sigma * the largest abs(tau_t) among the experts whose entry has sign sigma.
    mask_t = [tau_t has sign sigma]. scale_t = sum abs(tau_t) / sum abs(mask_t * tau_uni) over the whole model, as in
    the paper. The authors' code and FusionBench add up each tensor's *mean* in both sums, so a bias weighs as much as a
    matrix. They agree with the paper on a model of one tensor. If sum_t tau_t is exactly 0 there is no sign and the
    entry is dropped, as in the paper; the authors' code and FusionBench take the sign as negative.

    Raises InputError unless `task` is one of the experts.
    """
    row = vectors.experts.index(task)
    scale = _scale(vectors, row)

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        return base + scale * masked(unified(taus), taus[row])

    return vectors.merged(merge)


def unified(taus: Tensor) -> Tensor:
    """Return tau_uni (*shape) of task vectors (T, *shape)."""
    sign = taus.sum(dim=0).sign()
    return sign * (sign * taus).amax(dim=0)


def masked(unified: Tensor, tau: Tensor) -> Tensor:
    """Return the entries of `unified` that have the sign of `tau`, 0 elsewhere."""
    return torch.where(unified.sign() == tau.sign(), unified, 0.0)


def _scale(vectors: TaskVectors, row: int) -> float:
    own = kept = 0.0
    for name in vectors:
        if vectors.base[name].is_floating_point():
            taus = vectors[name]
            own += taus[row].abs().sum(dtype=torch.float64).item()
            kept += masked(unified(taus), taus[row]).abs().sum(dtype=torch.float64).item()
    return own / kept if kept else 0.0
