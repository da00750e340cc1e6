"""How cases are measured: in turn, round after round, after a warm-up. Ratios are taken within a round."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twin_bench.twin.speed import wait_for

CPU = torch.device("cpu")


class Case(NamedTuple):
    """Something to run, and how many rows (or tokens) it answers. `against` is the case that it is compared with."""

    run: Callable[[], object]
    amount: int
    against: str = "plain"


class Cases(NamedTuple):
    """Cases by name, notes about them, and the names of those that may be unsupported (they raise ValueError)."""

    cases: Mapping[str, Case]
    notes: Mapping[str, Any]
    optional: Collection[str] = ()


def measure(given: Cases, rounds: int, device: torch.device = CPU) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return each case's rate a second (the median and every run's) and its ratio, and why other cases are missing.

    The clock is read when the device has done all its work. On a CUDA device each case has `peak_bytes`: what torch
    allocated in it, beside what was there before.
    """
    cases = dict(given.cases)
    unsupported: dict[str, str] = {}
    for name, case in given.cases.items():
        try:
            case.run()
            wait_for(device)
        except ValueError as error:
            if name not in given.optional:
                raise
            unsupported[name] = str(error)
            del cases[name]
        print(f"warmed up: {name}", file=sys.stderr)
    rates: dict[str, list[float]] = {name: [] for name in cases}
    peaks: dict[str, dict[str, int]] = {name: {} for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            wait_for(device)
            before = _allocated(device)
            started = time.perf_counter()
            case.run()
            wait_for(device)
            rates[name].append(case.amount / (time.perf_counter() - started))
            if before is not None:
                peaks[name] = {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}
    return {
        name: {
            "per_second": statistics.median(values),
            "against": cases[name].against,
            "ratio": statistics.median(v / p for v, p in zip(values, rates[cases[name].against], strict=True)),
            "runs": values,
            **peaks[name],
        }
        for name, values in rates.items()
    }, unsupported


def finished(tensor: Tensor) -> None:
    """Wait until a tensor is computed."""
    wait_for(tensor.device)


def _allocated(device: torch.device) -> int | None:
    """Return the bytes that torch has allocated on a CUDA device, from which on peaks count; None on another one."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
