"""The checks that every tensor of weights passes when it is read: its dtype, and that it holds neither NaN nor inf."""

from __future__ import annotations

import torch
from torch import Tensor

from twin_bench.errors import InputError, NotFiniteError

WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of weights. Others are codes of a quantisation, or have an imaginary part that a sum would drop."""
REPAIR = "repair or retrain that checkpoint"


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor inf.

    A tensor with NaN or inf has a sum that is NaN or inf, and a sum is ten times faster than torch.isfinite. The sum
    of finite entries can overflow too, so the entries are checked if it is not finite.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def require_finite(tensor: Tensor, name: str, source: str, remedy: str = REPAIR) -> Tensor:
    """Return `tensor`. InputError that names it, its source and the remedy if it holds NaN or inf."""
    if not all_finite(tensor):
        raise InputError(f"{source}: tensor {name} holds NaN or inf; {remedy}")
    return tensor


def require_dtype(tensor: Tensor, name: str, source: str) -> Tensor:
    """Return `tensor`. InputError that names it, its source and its dtype if that is no dtype of weights."""
    if tensor.dtype not in WEIGHTS:
        raise InputError(
            f"{source}: tensor {name} is {_named(tensor.dtype)}; weights are {', '.join(map(_named, WEIGHTS))}; "
            "dequantise or convert that checkpoint before merging it"
        )
    return tensor


def require_weights(tensor: Tensor, name: str, source: str) -> Tensor:
    """Return `tensor`. InputError as `require_dtype` and `require_finite` raise."""
    return require_finite(require_dtype(tensor, name, source), name, source)


def require_no_overflow(tensor: Tensor, name: str, computed_by: str) -> Tensor:
    """Return a computed `tensor`. NotFiniteError that names it and what computed it if it holds NaN or inf.

    It is computed from finite tensors, so an overflow of its dtype is the cause.
    """
    if not all_finite(tensor):
        raise NotFiniteError(
            f"{computed_by}: tensor {name} overflows {_named(tensor.dtype)}; set dtype: bfloat16 or float32, which "
            "have a wider range, or lower the scaling"
        )
    return tensor


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
