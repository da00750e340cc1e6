"""A rehearsal of a merge: tiny tensors stand in for the experts', so that a wrong option is found at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twin_bench.merging.registry import MergeMethod
from twin_bench.merging.task_vectors import TaskVectors

SHAPES = {"layers.0.dense.weight": (5, 4), "layers.0.dense.bias": (5,), "layers.1.dense.weight": (4, 5)}
"""Names with a depth, for methods that scale by it."""


def rehearse_merge(method: MergeMethod, options: Mapping[str, Any], experts: Sequence[str]) -> None:
    """Begin to merge tiny tensors with the options that the experts will be merged with.

    Args:
        method: a method's header.
        options: its options, defaults included.
        experts: the experts' names.

    Raises:
        InputError: an option is out of its range.
        UnsuitedError: the method takes another number of experts.
    """
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tuned = {
        expert: {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for expert in experts
    }
    header = method.given(options)
    inputs: dict[str, Any] = {"task": experts[0], "statistics": dict.fromkeys(experts, _statistics(method, base))}
    options = header.checked(options)
    # A method checks its options before it gives a merge of which nothing is computed until it is read.
    header.function(TaskVectors(base, tuned), **options, **{name: inputs[name] for name in method.inputs})


def _statistics(method: MergeMethod, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return statistics of the kind that the method reads: a Fisher diagonal, or Gram matrices of the inputs."""
    if method.statistics == "fisher":
        return {name: torch.ones_like(tensor) for name, tensor in base.items()}
    return {name: torch.eye(tensor.shape[1]) for name, tensor in base.items() if tensor.ndim == 2}
