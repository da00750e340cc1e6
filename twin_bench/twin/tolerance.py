"""Tolerance: leaving out small fusion weights, as long as the error of the logits stays small.

A router gives every expert some weight, and most weights are close to 0. Small weights are what makes fusion expensive:
rows that use one expert can share a fused model, and a row that uses two experts multiplies the factors of both.
Leaving out weights changes a row's logits f by

    |f(w') - f(w)| <= |w' - w|_1 max_k |df / dw_k|

where the maximum is taken between w and w'. `sensitivity` estimates it when a twin is built, by finite differences at
the router's own weights of held-out training rows. It is the root mean square over a task's rows, relative to the size
of their logits. `simplified` keeps |w' - w|_1 times the sensitivity below the tolerance. To first order this bounds the
root mean square of the error over such rows. The error on other rows is measured by tests and by `twin_bench.bench`.
Each row is simplified by itself, so a row's result depends on nothing else in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from twin_bench.errors import InputError
from twin_bench.protocols import ProtocolName

STEP = 0.05
"""The change of a weight for a finite difference."""


class Probed(Protocol):
    """The part of a twin that `sensitivity` uses."""

    expert_names: tuple[str, ...]

    def probe(self, encoded: Sequence[Mapping[str, list[int]]], tasks: Sequence[str], weights: Tensor) -> list[Tensor]:
        """Return the logits that give each row's answer, for fusion weights (rows, experts)."""


def allowed_tolerance(
    asked: float | None, protocol: ProtocolName, dtype: torch.dtype, sensitivity: float | None, experts: int
) -> float:
    """Return the error of the logits that a twin allows, relative to their size.

    Args:
        asked: what a caller asks for. None is what rounding a logit to `dtype` may change, a half of the rounding unit,
            and in half precision an eighth of it.
        protocol: under `paper` the tolerance is always 0.
        dtype: what the model computes in.
        sensitivity: the twin's, or None if it is not known.
        experts: how many there are; without any, there is nothing to leave out.

    Raises:
        InputError: a tolerance that is no fraction, or one of a twin that does not say how sensitive it is.
    """
    if asked is not None and not (isinstance(asked, int | float) and 0 <= asked < 1):
        raise InputError(f"tolerance {asked}: a fraction of the logits' size, 0 (exact) or more and below 1")
    if protocol == "paper":
        return 0.0
    if asked is None:
        return 0.0 if sensitivity is None else torch.finfo(dtype).eps / (8 if dtype.itemsize < 4 else 2)
    if asked and experts and sensitivity is None:
        raise InputError("tolerance: this twin does not say how sensitive it is; build it again, with a router")
    return asked


def sensitivity(
    twin: Probed, encoded: Sequence[Mapping[str, list[int]]], tasks: Sequence[str], weights: Tensor
) -> float:
    """Return how far logits move, relative to their size, for each unit of an expert's weight.

    For a row, the largest change of any logit by any expert is taken, and the largest logit. The sensitivity of a task
    is the quotient of their root mean squares over its rows. The result is the largest sensitivity of all tasks.

    Args:
        twin: The twin.
        encoded: Encoded rows.
        tasks: The rows' tasks.
        weights: (rows, experts) fusion weights at which the derivatives are taken, the router's own.

    Raises:
        InputError: All logits of a task's rows are 0.
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
    for task, own in sizes.items():
        if not any(own):
            raise InputError(f"expert {task!r}: all its logits are 0 on its own rows; check its head, or retrain it")
    return max(_root_mean_square(moves[task]) / _root_mean_square(sizes[task]) for task in sizes)


def simplified(weights: Tensor, change: float) -> Tensor:
    """Return simpler fusion weights (N, K). The absolute changes of a row's weights add up to at most `change`.

    If the change allows it, a row's largest weight becomes 1 and all others 0. Otherwise its smallest weights become 0.
    """
    if change <= 0 or not weights.numel():
        return weights
    given, weights = weights, weights.cpu()  # not every device has float64
    top = weights.abs().argmax(dim=1)
    one_hot = torch.nn.functional.one_hot(top, weights.shape[1]).to(weights)
    magnitudes, order = weights.abs().double().sort(dim=1)
    dropped = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, order, magnitudes.cumsum(dim=1) <= change)
    dropped.scatter_(1, top[:, None], False)  # The largest weight is kept: it decides the head under `routed`.
    alone = ((one_hot.double() - weights.double()).abs().sum(dim=1) <= change) & weights.any(dim=1)
    return torch.where(alone[:, None], one_hot, weights.masked_fill(dropped, 0)).to(given.device)


def _root_mean_square(values: Sequence[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5
