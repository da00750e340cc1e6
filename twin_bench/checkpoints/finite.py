"""NaN and inf, looked for in every tensor that is read."""

import torch
from torch import Tensor

from twin_bench.errors import InputError


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor inf.

    NaN and inf survive a sum, and a sum is ten times faster than torch.isfinite; a sum that merely
    overflows is looked at entry by entry.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def require_finite(tensor: Tensor, name: str, source: str) -> Tensor:
    """Return `tensor`, or raise an InputError that names it when it holds NaN or inf."""
    if not all_finite(tensor):
        raise InputError(f"{source}: tensor {name} holds NaN or inf; mend or retrain that checkpoint")
    return tensor
