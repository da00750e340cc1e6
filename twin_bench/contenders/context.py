"""The input of a method that makes contenders, a contender, and a contender made of one set of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor

from twin_bench.checkpoints.sources import Sources, load_model
from twin_bench.contenders.storage import bytes_of, head_bytes
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import TaskType
from twin_bench.measured import Taken
from twin_bench.protocols import PROTOCOLS, ProtocolName
from twin_bench.twin.builder import ORACLE_PARAMETERS
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.model import TwinModel, twin_class
from twin_bench.twin.parts import PaperParts, Parts


@dataclass(frozen=True)
class Context:
    """The input of one method under one protocol.

    `settings` are the method's options, defaults and seed included. `tasks` are what is scored, with their rows, and
    `experts` the path or hub id of each expert. `trust` says whether their files may hold pickles and code, as keys of
    a recipe. `rows` is how many rows of each task are scored (None: all). A method that learns at test time sees these
    rows and no others. `router` are settings of routers that a method's own options do not have; with `data` among
    them, routers are trained on the rows there and not on the tasks' own.
    `protocols` are all that the suite runs; what is built for one is built for all of them.
    `workspace` is a folder for what is built from the inputs; its name identifies them. `feature_cache` is the folder
    of routers' features, if they are kept. `device` is where they, merges, statistics and what is learned are computed.
    """

    name: str
    settings: Mapping[str, Any]
    protocol: ProtocolName
    tasks: tuple[TaskRows, ...]
    base_model: str
    experts: Mapping[str, str]
    sources: Sources
    workspace: Path
    trust: Mapping[str, bool] = field(default_factory=dict)
    router: Mapping[str, Any] = field(default_factory=dict)
    protocols: tuple[ProtocolName, ...] = PROTOCOLS
    rows: int | None = None
    seed: int = 0
    max_length: int | None = None
    dtype: str | None = None
    calibration_rows: int = 256
    feature_cache: Path | None = None
    device: str = "cpu"
    progress: Progress = field(default_factory=lambda: Progress(disable=True))

    @property
    def task_type(self) -> TaskType:
        """The kind of model that is compared."""
        return self.sources.skeleton.task_type

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tasks."""
        return tuple(rows.task.name for rows in self.tasks)

    def names_of(self, expert: str) -> tuple[str, ...]:
        """Return the names of an expert's tasks."""
        return tuple(rows.task.name for rows in self.tasks if rows.task.expert == expert)

    @property
    def owned(self) -> tuple[str, ...]:
        """The names of the tasks that have an expert."""
        return tuple(rows.task.name for rows in self.tasks if rows.task.expert is not None)


@dataclass(frozen=True)
class Contender:
    """A model, the names of the tasks it answers, and its costs.

    `build` is how long the merge or the build took, and its peak memory. `parameters` counts the stored numbers,
    without heads. `stored_bytes` is what the *method* keeps for inference on all tasks, heads included, also where it
    enters one model for each expert: see `twin_bench.contenders.storage`, whose `base_bytes` is the size of one model.
    `notes` go into each cell, for example how a router was chosen.
    """

    twin: TwinModel
    tasks: tuple[str, ...]
    build: Taken
    parameters: int
    stored_bytes: int
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def build_seconds(self) -> float | None:
        """The seconds of the build. None if they were not measured."""
        return self.build.seconds

    @property
    def build_peak_bytes(self) -> int | None:
        """The peak memory of the build, above what the process held before it. None if it was not measured."""
        return self.build.peak_bytes


def static_contender(
    parameters: Mapping[str, Tensor],
    tasks: Sequence[str],
    context: Context,
    *,
    dtype: str | None = None,
) -> Contender:
    """Return a contender made of one set of parameters, with the experts' heads. Its build is not measured yet.

    Under the paper protocol each task's expert supplies the biases as well.

    Args:
        parameters: the backbone's parameters by name.
        tasks: the names of the tasks that the model answers.
        context: supplies experts, protocol and dtype.
        dtype: the dtype of the model, by default the context's.
    """
    sources = context.sources
    parameters = dict(parameters.items())
    exclusive: dict[str, Exclusive] = {}
    if context.protocol == "paper" and sources.skeleton.head:
        biases = [name for name in parameters if ORACLE_PARAMETERS.search(name)]
        exclusive = {
            name: Exclusive({}, {n: expert[n].float() - parameters[n].float() for n in biases})
            for name, expert in sources.experts.items()
        }
    parts = Parts(
        heads={name: expert.head() for name, expert in sources.experts.items() if sources.skeleton.head},
        exclusive=exclusive,
        paper=PaperParts(),
    )
    twin = twin_class(context.task_type)(
        load_model(sources, parameters, dtype or context.dtype),
        sources.tokenizer,
        parts,
        protocol=context.protocol,
        routing="none",
    )
    biases_kept = sum(bytes_of(own.vectors.values()) for own in exclusive.values())
    model = bytes_of(parameters.values()) + bytes_of(sources.buffers.values())
    return Contender(twin, tuple(tasks), Taken(), size(parameters), model + biases_kept + head_bytes(sources))


def size(parameters: Mapping[str, Tensor]) -> int:
    """Return how many numbers the tensors hold."""
    return sum(tensor.numel() for tensor in parameters.values())
