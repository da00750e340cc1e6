"""Merge by a method's name: the one way from names and options to merged parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.merging.device import OnDevice, exact_device
from twin_bench.merging.registry import MergeMethod, find_method
from twin_bench.merging.task_vectors import FiniteMerge, TaskVectors


def merge_lazily(
    method: str,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    transposed: Collection[str] = frozenset(),
    device: str | torch.device | None = None,
    **params: Any,
) -> Mapping[str, Tensor]:
    """Merge as `merge` does, but compute each parameter when it is read.

    This needs memory for about 2 (T + 2) times the largest tensor in float32, on `device` if it is given. A method that
    draws draws the same on every device.
    """
    header = find_method(method).given(params)
    if not isinstance(header, MergeMethod):
        raise InputError(
            f"{method} is not a merge of weights alone: run it in a suite (twin-bench leaderboard), or build a twin "
            "(twin-bench build)"
        )
    placed = base if device is None else OnDevice(base, exact_device(device))
    vectors = TaskVectors(placed, experts, transposed=transposed)
    header.check_inputs(experts, params)
    options = header.checked({option: value for option, value in params.items() if option not in header.inputs})
    merged = FiniteMerge(method, header.function(vectors, **{**params, **options}))
    return merged if device is None else OnDevice(merged, "cpu")


def merge(
    method: str,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    transposed: Collection[str] = frozenset(),
    device: str | torch.device | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    """Merge experts into one set of parameters.

    Args:
        method: a name from `methods()`.
        base: the pretrained model theta_0, parameter name to tensor.
        experts: task to the fine-tuned model's mapping over the same names.
        transposed: the names of matrices that are stored (in, out), as the weights of GPT-2's Conv1D layers are. Some
            methods tell inputs from outputs.
        device: where it is computed, by default where the base is. The result is then on the CPU. Apple's GPUs have no
            float64, so `mps` leaves it to the CPU.
        **params: the method's options (`methods()[method].defaults`) and its inputs (`methods()[method].inputs`).
            Common options are `scaling` (lambda), `density` (the fraction that is kept) and `seed`. Inputs are `task`,
            if each task has its own parameters, and `statistics`, if the method uses them.

    Returns:
        Every name of `base`, in `base`'s dtypes. Sums are taken in float32 or better.

    Raises:
        InputError: an unknown method or option, a missing input, an option out of its range, or a tensor that an expert
            lacks, that has another shape or no dtype of weights, or that holds or becomes NaN or inf.
    """
    return dict(merge_lazily(method, base, experts, transposed=transposed, device=device, **params).items())
