"""Run a suite: every method on every task through a harness, one finished cell at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from twin_bench.checkpoints.sources import Sources, open_sources
from twin_bench.contenders import Contender, Context, contenders
from twin_bench.data.classification import labels_of
from twin_bench.data.named import NamedTask
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import Task
from twin_bench.errors import InputError, NotFiniteError, UnsuitedError
from twin_bench.files import digest, remove_abandoned, require_writable
from twin_bench.leaderboard import inputs as run_inputs
from twin_bench.results.cells import Board, Cell, Cells, Skipped, installed_versions, left_out
from twin_bench.leaderboard.checks import check_kind, check_names, check_options, check_rows
from twin_bench.leaderboard.harness import DEFAULT, Evaluated, Harness, Job, find_harness
from twin_bench.leaderboard.report import FILES
from twin_bench.leaderboard.suite import Entry, Suite, entry_of
from twin_bench.leaderboard.training import Working, check_routers, check_training, reads_own_rows, shared_rows
from twin_bench.leaderboard.tune import chosen, keep, to_tune, tuned, with_tuned
from twin_bench.merging.registry import ProtocolName, methods
from twin_bench.twin.device import usable_device

PAPER_ROWS = {"per-input": 1000}
PAPER_ROWS_STATIC = 1001
"""The authors score the first 1,000 validation rows of a task with a router, the first 1,001 without."""
TWINS_FORMAT = 4
"""The format of the folder of twins and statistics. It is raised when what is built from the same inputs changes."""


@dataclass(frozen=True)
class Run:
    """What all entries of one run share.

    `tasks` are the suite's tasks with their rows. `inputs` are the digests of weights and rows, `rows` how many rows of
    a task are scored (None: all), and `device` is where models are scored.
    """

    suite: Suite
    out: Path
    tasks: Mapping[str, TaskRows]
    sources: Sources
    inputs: dict[str, Any]
    harness: Harness
    rows: int | None
    device: str
    progress: Progress

    @property
    def cells(self) -> Cells:
        """The run's finished cells. Each harness has a folder of its own."""
        own = "" if self.harness.name == DEFAULT else f"-{self.harness.name}"
        return Cells(self.out / f"cells{own}")

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

    def answered(self, entry: Entry) -> list[str]:
        """Return the tasks that an entry answers: one that is told the task knows no answer where it is nobody's."""
        return [n for n, rows in self.tasks.items() if rows.task.expert is not None or not entry.told_the_task]

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


def run_suite(
    suite: Suite,
    out: Path,
    *,
    only: Sequence[str] | None = None,
    limit: int | None = None,
    harness: str = DEFAULT,
    tune: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Board:
    """Run those of a suite's cells that `out` does not hold yet; return all of the suite's cells that it then holds.

    A method that raises UnsuitedError, or whose model comes to NaN or inf, is skipped, with its reason: it has no cell
    in the result, not even for a task that it could do.

    Args:
        suite: what to run.
        out: where cells, generated rows, built twins and their routers' features go.
        only: labels or method names to run; the bounds run in any case. Other methods keep the cells that they have.
        limit: the first so many rows of each task; HELM draws as many.
        harness: the name of the harness that scores.
        tune: give each method that has a grid a second row, its options chosen on held-out training rows.
        device: where models are scored and routers' features computed: the CPU by default; `auto` is the fastest.
        progress: where the bars go.

    Raises:
        InputError: an unknown method or device, wrong rows, experts or options: before anything is run where it can be
            known.
    """
    asked = suite.entries(None if only is None else list(only))
    check_names(suite.kinds)
    suite = run_inputs.located(suite)
    scorer, device = find_harness(harness), str(usable_device(device))
    if tune and scorer.scores_own_rows:
        raise InputError(
            f"--tune chooses options on held-out training rows, which --harness {harness} does not score; leave it out"
        )
    named = [name for name, task in suite.kinds.items() if isinstance(task, NamedTask)]
    if tune and named:
        raise InputError(f"--tune chooses options on held-out training rows, and {named[0]} is scored on its own alone")
    asked = with_tuned(asked) if tune else asked
    rows = suite.rows if limit is None else limit
    run = _prepared(suite, asked, out, scorer, rows, device, progress or Progress(disable=True))
    _check(run, asked)
    cells, skipped = _run(run, asked)
    return _board(run, asked, cells, skipped)


Row = tuple[ProtocolName, str]
"""A row of the table: a protocol and a label."""


def _run(run: Run, asked: Sequence[Entry]) -> tuple[dict[Row, list[Cell]], list[Skipped]]:
    """Run what was asked for. Return each row's cells and the rows that do not suit the experts."""
    suite, cells, skipped = run.suite, dict[Row, list[Cell]](), list[Skipped]()
    work = [(p, entry) for p in suite.protocol for entry in asked if entry.runs_under(p)]
    bar = run.progress.add_task("cells", total=sum(len(run.answered(entry)) for _, entry in work))
    for protocol, entry in work:
        run.progress.update(bar, description=f"{protocol} {entry.label}")
        own: list[Cell] = []
        try:
            for cell in _cells(run, entry, protocol):
                own.append(cell)
                run.progress.advance(bar)
            cells[protocol, entry.label] = own
        except (UnsuitedError, NotFiniteError) as error:
            if entry.track == "bound":
                raise
            run.progress.advance(bar, len(run.answered(entry)) - len(own))
            skipped.append(Skipped(suite.name, protocol, entry.label, entry.track, str(error)))
    return cells, skipped


def _board(run: Run, asked: Sequence[Entry], cells: Mapping[Row, Sequence[Cell]], skipped: Sequence[Skipped]) -> Board:
    """Return the cells of this run and of earlier ones on the same inputs, and what is left out."""
    suite, rows, missing, order = run.suite, dict[Row, Sequence[Cell]](), list[str](), list(run.tasks)
    passed_over = {(method.protocol, method.method) for method in skipped}
    idle = [entry.label for entry in asked if not any(map(entry.runs_under, suite.protocol))]
    listed, own_labels = _listed(suite, asked, run.cells.labels()), {entry.label for entry in suite.entries()}
    for protocol in suite.protocol:
        for entry in listed:
            row = protocol, entry.label
            if not entry.runs_under(protocol) or row in passed_over:
                continue
            found = cells.get(row) or _finished(run, entry, protocol)
            if found:
                rows[row] = sorted(found, key=lambda cell: order.index(cell.task))
            elif entry.label in own_labels:
                missing.append(f"{entry.label} ({protocol})")
    others = run.cells.others(cell for own in rows.values() for cell in own)
    shown = [dataclasses.replace(cell, protocol=protocol) for (protocol, _), own in rows.items() for cell in own]
    labels = {label for _, label in rows} if not run.harness.scores_own_rows else ()
    shared = shared_rows(_working(run, [entry for entry in listed if entry.label in labels]))
    return Board(shown, skipped, [*left_out(missing, idle, others), *shared])


def _listed(suite: Suite, asked: Sequence[Entry], found: Sequence[str]) -> list[Entry]:
    """Return the entries that may have cells, each followed by its tuned row.

    They are the suite's, those that were asked for, and methods with their defaults whose label is among `found`.
    """
    entries = {entry.label: entry for entry in suite.entries()}
    for entry in (*asked, *(entry_of(label) for label in found if label in methods())):
        if not entry.to_tune:
            entries.setdefault(entry.label, entry)
    listed: list[Entry] = []
    for entry in entries.values():
        listed.append(entry)
        if entry.method.tune and to_tune(entry).label not in entries:
            listed.append(to_tune(entry))
    return listed


def _finished(run: Run, entry: Entry, listed: ProtocolName) -> list[Cell]:
    """Return a row's cells if all of them are finished, else none."""
    protocol = _computed_under(entry, run.suite, listed)
    known = chosen(entry, run.tuning, run.choice_key(entry, protocol)) if entry.to_tune else entry
    if known is None:
        return []
    tasks = run.answered(known)
    cells = [run.cells.read(protocol, known.label, task, run.key(known, protocol, task)) for task in tasks]
    found = [cell for cell in cells if cell is not None]
    return found if len(found) == len(cells) else []


def _check(run: Run, entries: Sequence[Entry]) -> None:
    """Raise an InputError for anything wrong with rows, options and output files. Scoring can take hours."""
    for file in FILES:
        require_writable(run.out / file)
    check_rows(run.tasks.values(), trained=any(reads_own_rows(entry, run.suite) for entry in entries))
    working = _working(run, entries)
    for entry, context in working:
        check_options(entry, context)
    check_routers(working)
    if not run.harness.scores_own_rows:
        check_training(working)


def _working(run: Run, entries: Iterable[Entry]) -> list[Working]:
    """Return each entry with its context, under each protocol under which it is computed."""
    return [(e, run.context(e, protocol)) for e in entries for protocol in _protocols(run.suite, e)]


def _protocols(suite: Suite, entry: Entry) -> list[ProtocolName]:
    run_under = filter(entry.runs_under, suite.protocol)
    return list(dict.fromkeys(_computed_under(entry, suite, protocol) for protocol in run_under))


def _prepared(
    suite: Suite,
    entries: Sequence[Entry],
    out: Path,
    harness: Harness,
    rows: int | None,
    device: str,
    progress: Progress,
) -> Run:
    """Clear what killed runs have left, open the experts, find the rows and take the digests of both."""
    remove_abandoned(out)
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
    return Run(suite, out, tasks, sources, inputs, harness, rows, device, progress)


def _cells(run: Run, given: Entry, listed: ProtocolName) -> Iterator[Cell]:
    """Yield the cells of one entry under one protocol: those that are there, then each new one when it is written."""
    suite = run.suite
    protocol = _computed_under(given, suite, listed)
    entry = _with_options(run, given, protocol)
    keys = {task: run.key(entry, protocol, task) for task in run.answered(entry)}
    done = {task: run.cells.read(protocol, entry.label, task, key) for task, key in keys.items()}
    yield from (cell for cell in done.values() if cell is not None)
    missing = [task for task, cell in done.items() if cell is None]
    if missing:
        for contender in contenders(entry.method, run.context(entry, protocol)):
            contender.twin.to(run.device)
            for task in contender.tasks:
                if task in missing:
                    cell = _scored(run, contender, entry, protocol, task, keys[task])
                    run.cells.write(cell)
                    yield cell


def _with_options(run: Run, entry: Entry, protocol: ProtocolName) -> Entry:
    """Return an entry with its options chosen, if it is to be tuned: those of an earlier run, or new ones."""
    if not entry.to_tune:
        return entry
    key = run.choice_key(entry, protocol)
    known = chosen(entry, run.tuning, key)
    if known is None:
        bounded = run.suite.model_copy(update={"rows": run.rows})

        def trial(held_out: Suite) -> Board:
            return run_suite(held_out, run.tuning, harness=run.harness.name, device=run.device, progress=run.progress)

        known = tuned(entry, protocol, bounded, list(run.tasks.values()), run.tuning, trial)
        keep(known, run.tuning, key)
    return known


def _scored(run: Run, contender: Contender, entry: Entry, protocol: ProtocolName, task: str, key: str) -> Cell:
    job = Job(
        name=f"{protocol}-{entry.label}",
        asked=run.tasks[task],
        suite=run.suite,
        workspace=run.out / run.harness.name,
        rows=run.rows_scored(entry, protocol),
    )
    started = time.perf_counter()
    try:
        evaluated = run.harness.score(contender, job)
    except NotFiniteError as error:
        raise NotFiniteError(f"{task}: {error}") from None
    seconds = time.perf_counter() - started
    return _cell(evaluated, seconds, contender, entry, protocol, run.suite, job.asked.task, key)


def _cell(
    evaluated: Evaluated,
    seconds: float,
    contender: Contender,
    entry: Entry,
    protocol: ProtocolName,
    suite: Suite,
    task: Task,
    key: str,
) -> Cell:
    unit = 100 if task.percent else 1
    notes: Mapping[str, Any] = {**contender.notes, **entry.notes, **evaluated.notes}
    return Cell(
        suite=suite.name,
        protocol=protocol,
        method=entry.label,
        track=entry.track,
        task=task.name,
        expert=task.expert,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        score=unit * evaluated.score,
        stderr=None if evaluated.stderr is None else unit * evaluated.stderr,
        n=evaluated.n,
        seed=suite.seed,
        seconds=seconds,
        build_seconds=contender.build_seconds,
        parameters=contender.parameters,
        settings=entry.settings(suite.seed),
        notes=notes,
        device=contender.twin.device.type,
        versions=installed_versions(),
        key=key,
    )


def _computed_under(entry: Entry, suite: Suite, protocol: ProtocolName) -> ProtocolName:
    """Return `standard` where `protocol` changes nothing for an entry, so that its cells are those of `standard`.

    The bounds have no router that could name a head, and no factors of a language model's that could be added. A
    language model has no head.
    """
    bound, causal = entry.track == "bound", not suite.classifies
    same = bound or causal if protocol == "routed" else protocol == "paper" and bound and causal
    return "standard" if same else protocol
