"""Reading the statistics of training inputs that a method was given, with checks."""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.checkpoints.finite import require_finite
from twin_bench.errors import InputError
from twin_bench.merging.registry import Statistics


def statistics_of(
    method: str, statistics: Statistics, task: str, name: str, shape: torch.Size, device: torch.device
) -> Tensor:
    """Return one tensor of an expert's statistics, on a device.

    Raises InputError if it is missing, misshapen or not finite.
    """
    if name not in statistics[task]:
        raise InputError(f"{method}: the statistics of expert {task!r} have no {name}; compute them on this model")
    source = f"{method}: statistics of expert {task!r}"
    tensor = require_finite(statistics[task][name], name, source, "compute them again")
    if tensor.shape != shape:
        raise InputError(
            f"{method}: the statistics of expert {task!r} have {name} as {tuple(tensor.shape)}, not {tuple(shape)}; "
            "compute them on this model"
        )
    return tensor.to(device)
