"""Names of the dtypes that a model can have."""

from __future__ import annotations

import torch

from twin_bench.errors import InputError


def known_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of that name, or None for `auto` and None. InputError for an unknown name."""
    if dtype in (None, "auto") or isinstance(dtype, torch.dtype):
        return None if isinstance(dtype, str) else dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r}: known: float32, bfloat16, float16, auto")
    return found
