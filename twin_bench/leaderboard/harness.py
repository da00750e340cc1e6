"""The interface of a harness: who scores a contender on a task. Adapters implement it, entry points find it."""

from __future__ import annotations

import abc
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from twin_bench.contenders import Contender
from twin_bench.errors import OUTDATED, InputError, first_line, nearest
from twin_bench.leaderboard.suite import Suite

ENTRY_POINTS = "twin_bench.harnesses"
"""The group of entry points that name a harness' class: the entry point's name is the harness' name."""
DEFAULT = "lm-eval"


@dataclass(frozen=True)
class Job:
    """One cell that a harness is to score.

    `name` tells the contender from all others of the run. `rows` is how many of the task's rows are scored (None:
    all). `data` holds {task}/{split}.jsonl, and `workspace` is a folder of the harness' own.
    """

    name: str
    task: str
    suite: Suite
    data: Path
    workspace: Path
    rows: int | None


@dataclass(frozen=True)
class Evaluated:
    """A task's score and its standard error (0 to 1) over `n` rows, and what else is known."""

    score: float
    stderr: float
    n: int
    notes: Mapping[str, Any] = field(default_factory=dict)


class Harness(abc.ABC):
    """A harness. `scores_own_rows` says that it scores rows of its own and not the suite's."""

    name: ClassVar[str]
    scores_own_rows: ClassVar[bool] = False

    @abc.abstractmethod
    def check(self, suite: Suite) -> None:
        """Raise an InputError for a suite that the harness can't score."""

    def input_digests(self, suite: Suite, data: Path, workspace: Path) -> dict[str, str]:
        """Return digests of inputs that only this harness reads, as TASK/NAME to digest; make them ready to be read.

        Raises InputError where one is missing.
        """
        return {}

    @abc.abstractmethod
    def score(self, contender: Contender, job: Job) -> Evaluated:
        """Score a contender on one task."""

    def timed_runs(
        self, twin: Any, plain: Any, tasks: Sequence[str], data: Path, *, split: str, rows: int, batch_size: int
    ) -> Mapping[str, Callable[[], object]]:
        """Return whole evaluations for the benchmark to time, by name: of a twin, and of the plain model.

        Args:
            twin: a language model's twin.
            plain: the transformers model that holds the shared expert.
            tasks: what is asked.
            data: {task}/{split}.jsonl.
            split: which rows.
            rows: documents of a task.
            batch_size: requests a forward, of both.
        """
        return {}


def find_harness(name: str) -> Harness:
    """Return the harness of a name; InputError for an unknown one, or one whose package is not installed."""
    points = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if not points:
        raise InputError(f"no harness is registered: {OUTDATED}")
    if name not in points:
        raise InputError(f"unknown harness {name!r}{nearest(name, points)}")
    try:
        found: Harness = points[name].load()()
    except ImportError as error:
        raise InputError(
            f"harness {name}: {points[name].value} can't be imported ({first_line(error)}); install what it needs "
            f"(twin-bench's own: pip install 'twin-bench[{name}]')"
        ) from error
    if found.name != name:
        raise InputError(
            f"harness {name}: {points[name].value} calls itself {found.name!r}; its cells would be mixed up"
        )
    return found
