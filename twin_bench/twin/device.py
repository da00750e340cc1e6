"""The device that a twin runs on: who chooses it, and whether it is there."""

from __future__ import annotations

import torch

from twin_bench.errors import InputError, first_line

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
