"""How cases are measured: in turn, round after round, after a warm-up. Ratios are taken within a round."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def measure(given: Cases, rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each case's rate a second (the median and every run's) and its ratio, and why other cases are missing."""
    cases = dict(given.cases)
    unsupported: dict[str, str] = {}
    for name, case in given.cases.items():
        try:
            case.run()
        except ValueError as error:
            if name not in given.optional:
                raise
            unsupported[name] = str(error)
            del cases[name]
        print(f"warmed up: {name}", file=sys.stderr)
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            started = time.perf_counter()
            case.run()
            rates[name].append(case.amount / (time.perf_counter() - started))
    return {
        name: {
            "per_second": statistics.median(values),
            "against": cases[name].against,
            "ratio": statistics.median(v / p for v, p in zip(values, rates[cases[name].against], strict=True)),
            "runs": values,
        }
        for name, values in rates.items()
    }, unsupported


def finished(tensor: Tensor) -> None:
    """Wait until a tensor is computed."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
