"""Numbers that are not finite are an error where they first appear, and never an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twin_bench.checkpoints.finite import all_finite
from twin_bench.errors import NotFiniteError

NAMED = 5
"""The largest number of rows that a message names."""


def require_finite(values: Tensor, what: str, remedy: str, rows: Sequence[int] | None = None) -> None:
    """Raise a NotFiniteError that names the rows of `values` with NaN or inf.

    The device is asked once if there is none.

    Args:
        values: (N, ...).
        what: what the values are, to name them.
        remedy: what made them, and what to do about it.
        rows: the numbers by which the N rows are named; by default 0 to N - 1.
    """
    if all_finite(values):
        return
    bad = _bad_rows(values)
    named = [str(index if rows is None else rows[index]) for index in bad[:NAMED]]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    raise NotFiniteError(f"{what}: row{'s' * (len(bad) > 1)} {', '.join(named)}{more} not finite; {remedy}")


def require_finite_logits(
    values: Tensor, rows: Sequence[int], weights: Tensor, experts: Sequence[str], dtype: torch.dtype
) -> None:
    """Raise a NotFiniteError that names the rows of a batch whose logits are not finite, and the first one's weights.

    Args:
        values: (batch, ...), the logits, or their `peaks`.
        rows: the batch's rows, which index `weights`. With beams a row stands for several of `values`.
        weights: (N, experts or more), the fusion weights.
        experts: the experts' names.
        dtype: the dtype in which the model computes.
    """
    if all_finite(values):
        return
    each = [row for row in rows for _ in range(max(1, len(values) // len(rows)))]
    first = weights[each[_bad_rows(values)[0]]].tolist()
    mix = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(experts, first, strict=False) if weight)
    what = f"logits in {str(dtype).removeprefix('torch.')}, of the fusion with {mix or 'no expert'}"
    require_finite(values, what, _remedy(dtype), each)


def peaks(logits: Tensor) -> Tensor:
    """Return the largest logit of each row and position, (...) for logits (..., vocabulary).

    It is finite if and only if the logits make a distribution: none is NaN or +inf, and not all are -inf. Some may be
    -inf: those of a vocabulary's padding, or of tokens that a model never says.
    """
    return logits.amax(dim=-1)


def _bad_rows(values: Tensor) -> list[int]:
    return (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero().flatten().tolist()


def _remedy(dtype: torch.dtype) -> str:
    """Return what makes a model of `dtype` overflow, and what to do about it."""
    if dtype == torch.float16:
        return "float16 holds nothing above 65504: try float32 or bfloat16"
    return "check the experts' weights, and use smaller fusion weights"
