"""Tolerance: simpler fusion weights whose logits are as good.

A router gives every expert some weight, most of it next to nothing. Rows whose weights are one expert's alone share a
fusion, and a row that uses two experts multiplies two experts' factors: so it is small weights that fusion costs.
Leaving some out changes a row's logits f by

    |f(w') - f(w)| <= |w' - w|_1 max_k |df / dw_k|

along the way from w to w'. `sensitivity` estimates that maximum when a twin is built, by finite differences at the
router's own weights of held-out training rows: its root mean square over a task's rows, relative to the size of their
logits. `simplified` keeps |w' - w|_1 times it below the tolerance, and so, to first order, the root mean square of the
error over such rows; what it is on others is measured (tests, `twin_bench.bench`). It looks at one row at a time, so
that a row's result still depends on nothing else in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

STEP = 0.05
"""The change of a weight over which a derivative is taken."""


class Probed(Protocol):
    """What `sensitivity` asks of a twin."""

    expert_names: tuple[str, ...]

    def probe(self, encoded: Sequence[Mapping[str, list[int]]], tasks: Sequence[str], weights: Tensor) -> list[Tensor]:
        """Return the logits that each row's answer is read from, with given fusion weights (rows, experts)."""


def sensitivity(
    twin: Probed, encoded: Sequence[Mapping[str, list[int]]], tasks: Sequence[str], weights: Tensor
) -> float:
    """Return how far logits move, relative to their size, with a unit of an expert's weight.

    The largest change of any logit by any expert, as a root mean square over a task's rows, divided by that of the
    largest logit; of the task where this is most.

    Args:
        twin: whose experts.
        encoded: rows.
        tasks: of the rows.
        weights: (rows, experts) at which the derivatives are taken: the router's own.
    """
    experts = len(twin.expert_names)
    steps = torch.cat([torch.zeros(1, experts), STEP * torch.eye(experts)]).to(weights)
    copies = [row for row in range(len(encoded)) for _ in steps]
    found = twin.probe(
        [encoded[row] for row in copies], [tasks[row] for row in copies], (weights[:, None] + steps).flatten(0, 1)
    )
    sizes: dict[str, list[float]] = {}
    moves: dict[str, list[float]] = {}
    for row, task in enumerate(tasks):
        logits = torch.stack(found[row * len(steps) : (row + 1) * len(steps)]).double()
        sizes.setdefault(task, []).append(float(logits[0].abs().max()))
        moves.setdefault(task, []).append(float((logits[1:] - logits[0]).abs().max()) / STEP)
    return max(_root_mean_square(moves[task]) / _root_mean_square(sizes[task]) for task in sizes)


def simplified(weights: Tensor, change: float) -> Tensor:
    """Return fusion weights (N, K) that differ by at most `change` a row, in the sum of magnitudes.

    The largest weight becomes 1 and all others 0 where that is near enough; else the smallest are left out.
    """
    if change <= 0 or not weights.numel():
        return weights
    top = weights.abs().argmax(dim=1)
    one_hot = torch.nn.functional.one_hot(top, weights.shape[1]).to(weights)
    magnitudes, order = weights.abs().double().sort(dim=1)
    dropped = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, order, magnitudes.cumsum(dim=1) <= change)
    dropped.scatter_(1, top[:, None], False)  # a row keeps its largest, which names its head under `routed`
    alone = ((one_hot.double() - weights.double()).abs().sum(dim=1) <= change) & weights.any(dim=1)
    return torch.where(alone[:, None], one_hot, weights.masked_fill(dropped, 0))


def _root_mean_square(values: Sequence[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5
