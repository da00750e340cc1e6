"""What answers for a leaderboard entry, and one set of parameters served as such."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from twin_bench.checkpoints.sources import Sources, load_model
from twin_bench.leaderboard.suite import Suite
from twin_bench.twin.builder import ORACLE_PARAMETERS
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.model import TwinModel, twin_class
from twin_bench.twin.parts import PaperParts, Parts, ProtocolName


@dataclass(frozen=True)
class Served:
    """A model, the tasks it answers, and what it took.

    `parameters` are those stored, heads apart; `notes` go into each cell (how a router was chosen, say).
    """

    twin: TwinModel
    tasks: tuple[str, ...]
    build_seconds: float
    parameters: int
    notes: Mapping[str, Any]


def serve_static(
    parameters: Mapping[str, Tensor],
    tasks: Sequence[str],
    protocol: ProtocolName,
    suite: Suite,
    sources: Sources,
    started: float,
) -> Served:
    """Serve one set of parameters under the heads (and, under `paper`, the biases) of the experts of `tasks`."""
    parameters = dict(parameters.items())
    exclusive: dict[str, Exclusive] = {}
    if protocol == "paper" and sources.skeleton.head:
        biases = [name for name in parameters if ORACLE_PARAMETERS.search(name)]
        exclusive = {
            task: Exclusive({}, {n: sources.experts[task][n].float() - parameters[n].float() for n in biases})
            for task in tasks
        }
    parts = Parts(
        heads={task: sources.experts[task].head() for task in tasks if sources.skeleton.head},
        exclusive=exclusive,
        paper=PaperParts(),
    )
    kind = twin_class(sources.skeleton.task_type)
    twin = kind(
        load_model(sources, parameters, suite.dtype), sources.tokenizer, parts, protocol=protocol, routing="none"
    )
    return Served(twin, tuple(tasks), time.perf_counter() - started, size(parameters), {})


def size(parameters: Mapping[str, Tensor]) -> int:
    """Return how many numbers tensors hold."""
    return sum(tensor.numel() for tensor in parameters.values())
