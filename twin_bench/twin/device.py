"""The device that a twin runs on: who chooses it, and whether it is there."""

from __future__ import annotations

import math

import torch

from twin_bench.errors import InputError, first_line

SPARE = 0.1
"""The part of the free memory that no plan counts with: the allocator's gaps, and what libraries take."""
AUTO = "auto"
"""The name of the fastest device that is there."""


def fastest_device() -> str:
    """Return the name of the fastest kind of device that this machine has: cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return the named device: the CPU for None, and the fastest one for `auto`.

    Raises InputError for a device that this machine does not have.
    """
    try:
        chosen = torch.device(fastest_device() if device == AUTO else device or "cpu")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r}: {first_line(error)}") from None
    return chosen


STEPS = 16
"""The number of steps of a device's memory, to which free memory is rounded down: near figures make the same plans."""


def free_memory(device: torch.device, kept: float = 0) -> float | None:
    """Return the bytes that tensors may take on a CUDA device beside those that are there. None for another device.

    What torch holds without using it counts as free. So do `kept` bytes of tensors that can be freed.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return rounded((1 - SPARE) * (free + unused + kept), total)


def rounded(free: float, total: float) -> float:
    """Return free bytes, rounded down to a sixteenth of a device's `total`, or finer where little is free."""
    if free <= 0:
        return 0.0
    step = min(total / STEPS, 2.0 ** math.floor(math.log2(free / 4)))
    return free // step * step
