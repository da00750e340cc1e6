"""The interface of a harness: who scores a contender on a task. Adapters implement it, entry points find it."""

from __future__ import annotations

import abc
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from twin_bench.contenders import Contender
from twin_bench.data.named import NamedTask
from twin_bench.data.registry import TASKS
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import Row, Task
from twin_bench.errors import OUTDATED, InputError, first_line, nearest
from twin_bench.leaderboard.suite import Suite
from twin_bench.results.cells import DEFAULT_HARNESS
from twin_bench.results.samples import Samples

ENTRY_POINTS = "twin_bench.harnesses"
"""The group of entry points that name a harness' class: the entry point's name is the harness' name."""
DEFAULT = DEFAULT_HARNESS


@dataclass(frozen=True)
class Job:
    """One cell that a harness is to score.

    `name` tells the contender from all others of the run. `asked` is the task with its rows, and `rows` how many of
    them are scored (None: all). `workspace` is a folder of the harness' own.
    """

    name: str
    asked: TaskRows
    suite: Suite
    workspace: Path
    rows: int | None


@dataclass(frozen=True)
class Evaluated:
    """A task's score and its standard error over `n` rows, the rows' answers, and what else is known.

    Score and error are in the metric's own unit: 0 to 1 where the task's score is a fraction. A score whose error is
    not known has None. `model_seconds` is the time that the model took, without the harness: None if nobody measured
    it. A harness that gives no `samples` has intervals by its standard errors, and no paired comparisons.
    """

    score: float
    stderr: float | None
    n: int
    samples: Samples | None = None
    model_seconds: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


class Harness(abc.ABC):
    """A harness. `scores_own_rows` says that it scores rows of its own and not the suite's.

    `knows_clusters` says that its samples hold the rows' sources, where a task names them.
    """

    name: ClassVar[str]
    scores_own_rows: ClassVar[bool] = False
    knows_clusters: ClassVar[bool] = True

    @abc.abstractmethod
    def check(self, suite: Suite) -> None:
        """Raise an InputError for a suite that the harness can't score."""

    def tasks(self, suite: Suite) -> Mapping[str, Task]:
        """Return the suite's tasks, with the metrics of those that the harness brings (`NamedTask`).

        Raises InputError for a task that the harness does not have. By default it brings none.
        """
        for name, task in suite.kinds.items():
            if isinstance(task, NamedTask):
                raise InputError(f"unknown task {name!r}{nearest(name, TASKS)}; harness {self.name} brings none")
        return suite.kinds

    def input_digests(self, suite: Suite, tasks: Mapping[str, TaskRows], workspace: Path) -> dict[str, str]:
        """Return digests of inputs that only this harness reads, as TASK/NAME to digest; make them ready to be read.

        Raises InputError where one is missing.
        """
        return {}

    def row_count(self, rows: TaskRows) -> int | None:
        """Return how many rows of a task there are to be scored; None if that is not known before they are scored."""
        return None if self.scores_own_rows or isinstance(rows.task, NamedTask) else len(rows.read(rows.split))

    def prompts(self, task: Task, *, scored: bool) -> Iterable[Row]:
        """Yield rows of a task that the harness brings: {"text": prompt as it is scored, "answer": text}.

        They are the rows that are `scored`, or those of another split; there are none if the task has no other.
        """
        return ()

    def training_answers(self, task: Task) -> Sequence[str | int] | None:
        """Return the expected answers of training documents of a task that the harness brings.

        They compare with the samples' targets: the index of the right option, or a text. There are none if answers are
        free texts. None says that no constant answer can be scored by comparing it with the targets: likelihoods of
        whole texts, scores of which less is better, one answer that is always right, no training documents.
        """
        return None

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
