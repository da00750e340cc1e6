"""T-Switch (Qi et al., 2025): a task vector as a scale, a mask and signs, for a task that is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twin_bench.merging.registry import merge_method, require_fraction
from twin_bench.merging.task_vectors import TaskVectors


def stored_bytes(shapes: Sequence[torch.Size], experts: int, itemsize: int) -> int:
    """Return how many bytes are stored: theta_0, and for each expert two bits a parameter and a scale a tensor.

    The bits are the mask and the sign. They are filled up to whole numbers of `itemsize` bytes.
    """
    parameters = sum(shape.numel() for shape in shapes)
    return itemsize * (parameters + experts * (math.ceil(2 * parameters / (8 * itemsize)) + len(shapes)))


@merge_method(
    title="T-Switch",
    paper="arXiv:2412.00054",
    track="task-id given",
    needs=("the task of each input",),
    stored=stored_bytes,
)
def t_switch(vectors: TaskVectors, *, task: str, density: float = 0.4) -> Mapping[str, Tensor]:
    """theta_0 + scale * mask * sign(tau_t), the parameters of task t, tensor by tensor.

    mask keeps the int(density p) largest of a tensor's p positive entries, and the int(density q) largest in magnitude
    of its q negative ones; all of them if that number is 0. scale = |mask tau_t| / |mask|, so that the length is what
    the mask leaves. A tensor without dimensions is the expert's own.

    This is the authors' code, and density its default for full checkpoints (drop ratio 0.6; for LoRA experts they keep
    0.6). The paper has one scale for each task. Auto-Switch, which asks the nearest of a few stored inputs for the
    task, is the same vectors behind a router. Stored are two bits an entry here; the authors also leave out groups of
    four entries that the mask drops.

    Raises InputError unless `task` is one of the experts.
    """
    require_fraction("t_switch", "density", density)
    row = vectors.experts.index(task)

    def merge(name: str, base: Tensor, taus: Tensor) -> Tensor:
        tau = taus[row]
        return base + (binary(tau, density) if tau.ndim else tau)

    return vectors.merged(merge)


def binary(tau: Tensor, density: float) -> Tensor:
    """Return the signs of the largest entries of `tau`, scaled to their length."""
    signs = torch.zeros_like(tau)
    for sign in (1, -1):
        sizes = (sign * tau)[sign * tau > 0]
        if sizes.numel():
            kept = int(density * sizes.numel()) or sizes.numel()
            signs[sign * tau >= sizes.kthvalue(sizes.numel() - kept + 1).values] = sign
    length = torch.linalg.vector_norm(signs, dtype=torch.float64)
    scale = torch.linalg.vector_norm(tau * signs, dtype=torch.float64) / length if length else 0.0
    return signs.mul_(float(scale))
