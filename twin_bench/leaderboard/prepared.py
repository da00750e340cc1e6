"""What all entries of a run share, made ready before the first cell: experts, rows, and digests of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import Progress

from twin_bench.checkpoints.sources import Sources, open_sources
from twin_bench.contenders import Context
from twin_bench.contenders.references import ReferenceMethod
from twin_bench.data.classification import labels_of
from twin_bench.data.rows import TaskRows
from twin_bench.files import digest
from twin_bench.leaderboard import inputs as run_inputs
from twin_bench.leaderboard.checks import check_kind
from twin_bench.leaderboard.harness import Harness
from twin_bench.leaderboard.suite import Entry, Suite
from twin_bench.leaderboard.training import reads_own_rows
from twin_bench.protocols import ProtocolName
from twin_bench.results.cells import Board, Cells

PAPER_ROWS = {"per-input": 1000}
PAPER_ROWS_STATIC = 1001
"""The authors score the first 1,000 validation rows of a task with a router, the first 1,001 without."""
TWINS_FORMAT = 6
"""The format of the folder of twins and statistics. It is raised when what is built from the same inputs changes."""


@dataclass(frozen=True)
class Run:
    """What all entries of one run share.

    `tasks` are the suite's tasks with their rows. `inputs` are the digests of weights and rows, `rows` how many rows of
    a task are scored (None: all), and `device` is where models are built and scored. `log_texts` says that samples keep
    the rows' inputs. `trial` runs another suite in the same way, for --tune. `started` is when the run began, in UTC.
    """

    suite: Suite
    out: Path
    tasks: Mapping[str, TaskRows]
    sources: Sources
    inputs: dict[str, Any]
    harness: Harness
    rows: int | None
    device: str
    log_texts: bool
    progress: Progress
    trial: Callable[[Suite], Board]
    started: str

    @property
    def cells(self) -> Cells:
        """The run's finished cells. Each harness has folders of its own."""
        return Cells(self.out, self.harness.name)

    @property
    def workspace(self) -> Path:
        """The folder of what is built from the run's inputs: other inputs have another folder."""
        decisive = {key: value for key, value in self.inputs.items() if key != "rows"}
        return self.out / "twins" / digest([TWINS_FORMAT, decisive, self.device_kind])[:16]

    @property
    def device_kind(self) -> str:
        """The kind of the device, which decides the last digits of what is computed: cpu, cuda, mps."""
        return self.device.partition(":")[0]

    @property
    def tuning(self) -> Path:
        """The folder of what options are chosen by: held-out rows, their cells, choices."""
        return self.out / "tuning"

    def of_each_seed(self, entry: Entry) -> Iterator[Run]:
        """Yield the run with each seed under which an entry is computed: several where its method draws."""
        for number in range(self.suite.seeds if entry.draws else 1):
            yield dataclasses.replace(self, suite=self.suite.model_copy(update={"seed": self.suite.seed + number}))

    def count(self, entry: Entry) -> int:
        """Return how many cells an entry has under one protocol. A reference's, which take no time, do not count."""
        if isinstance(entry.method, ReferenceMethod):
            return 0
        return len(self.answered(entry)) * sum(1 for _ in self.of_each_seed(entry))

    def answered(self, entry: Entry) -> list[str]:
        """Return the tasks that an entry answers: one that is told the task knows no answer where it is nobody's."""
        return [n for n, rows in self.tasks.items() if rows.task.expert is not None or not entry.told_the_task]

    def computed_under(self, entry: Entry, protocol: ProtocolName) -> ProtocolName:
        """Return `standard` where `protocol` changes nothing for an entry, so that its cells are those of `standard`.

        The bounds have no router that could name a head, and no factors of a language model's that could be added. A
        language model has no head.
        """
        bound, causal = entry.track == "bound", not self.suite.classifies
        same = bound or causal if protocol == "routed" else protocol == "paper" and bound and causal
        return "standard" if same else protocol

    def choice_key(self, entry: Entry, protocol: ProtocolName) -> str:
        """Return the digest of what decides which options are chosen for an entry. All rows of all tasks count."""
        return digest([self.key(entry, protocol, task) for task in self.tasks])

    def key(self, entry: Entry, protocol: ProtocolName, task: str) -> str:
        """Return the digest of everything that decides the score of one cell."""
        decisive = {key: value for key, value in self.inputs.items() if key != "suite_rows"}
        where = {"harness": self.harness.name, "device": self.device_kind}
        return run_inputs.cell_key(self.suite, entry, protocol, task, decisive, rows=self.rows, where=where)

    def context(self, entry: Entry, protocol: ProtocolName) -> Context:
        """Return what the entry's method makes its contenders from."""
        suite = self.suite
        return Context(
            name=entry.method.name,
            settings=entry.settings(suite.seed),
            protocol=protocol,
            tasks=tuple(self.tasks.values()),
            base_model=suite.base_model,
            experts=suite.expert_paths,
            trust=suite.trust,
            sources=self.sources,
            workspace=self.workspace,
            router=suite.router,
            protocols=tuple(suite.protocol),
            rows=self.rows_scored(entry, protocol),
            seed=suite.seed,
            max_length=suite.max_length,
            dtype=suite.dtype,
            calibration_rows=suite.calibration_rows,
            feature_cache=self.out / "features",
            device=self.device,
            progress=self.progress,
        )

    def rows_scored(self, entry: Entry, protocol: ProtocolName) -> int | None:
        """Return how many rows of a task are scored: under the paper's protocol at most as many as the authors'."""
        if protocol != "paper" or not self.suite.classifies:
            return self.rows
        most = PAPER_ROWS.get(entry.track, PAPER_ROWS_STATIC)
        return most if self.rows is None else min(most, self.rows)


def prepared(
    suite: Suite,
    entries: Sequence[Entry],
    out: Path,
    harness: Harness,
    rows: int | None,
    device: str,
    log_texts: bool,
    progress: Progress,
    trial: Callable[[Suite], Board],
) -> Run:
    """Open the experts, find the rows and take the digests of both."""
    harness.check(suite)
    labels = labels_of(suite.kinds.values())
    sources = open_sources(suite.base_model, suite.expert_paths, labels=labels, **suite.trust)
    check_kind(suite, sources.skeleton.task_type)
    trained = any(reads_own_rows(entry, suite) for entry in entries)
    tasks = run_inputs.rows_of(suite, harness.tasks(suite), out, harness, trained=trained)
    own = harness.input_digests(suite, tasks, out / harness.name)
    if any("training rows" in entry.method.sees for entry in entries):
        run_inputs.write_prompts(tasks.values(), harness, own)
        if "paper" in suite.protocol:
            run_inputs.write_prompts(tasks.values(), harness, own, scored=True)
    inputs = run_inputs.input_digests(suite, tasks)
    built_from = {**inputs["rows"], **run_inputs.named_digests(tasks.values(), own)}
    inputs |= {"suite_rows": built_from, "rows": {**inputs["rows"], **own}}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return Run(suite, out, tasks, sources, inputs, harness, rows, device, log_texts, progress, trial, started)
