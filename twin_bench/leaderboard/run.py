"""Run a suite: every method on every task through a harness, one finished cell at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, TaskID

from twin_bench.data.named import NamedTask
from twin_bench.errors import InputError, NotFiniteError, UnsuitedError, nearest
from twin_bench.leaderboard import inputs as run_inputs
from twin_bench.leaderboard.board import MATRIX_PROTOCOL, Line, board_of, listed_entries, matrix_entries, working
from twin_bench.leaderboard.checks import check_names, check_options, check_rows
from twin_bench.leaderboard.forecast import Forecast, forecast
from twin_bench.leaderboard.harness import DEFAULT, Harness, find_harness
from twin_bench.leaderboard.prepared import Run, prepared
from twin_bench.leaderboard.scoring import cells_of
from twin_bench.leaderboard.suite import Entry, Suite
from twin_bench.leaderboard.training import check_routers, check_training, reads_own_rows
from twin_bench.leaderboard.tune import with_tuned
from twin_bench.protocols import ProtocolName
from twin_bench.results.cells import Board, Cell, Skipped
from twin_bench.twin.device import usable_device

Work = list[tuple[ProtocolName, Entry]]
"""Entries to be computed, each under a protocol."""


@dataclass(frozen=True)
class RunOptions:
    """What is wanted of a suite.

    - `only`: labels or method names to run; the bounds run in any case. Other methods keep the cells that they have.
    - `limit`: the first so many rows of each task; HELM draws as many.
    - `harness`: the name of the harness that scores.
    - `tune`: give each method that has a grid a second row, its options chosen on held-out training rows.
    - `matrix`: score every expert on every task as well, for a table of its own.
    - `device`: where models are merged, learn and are scored: the CPU by default; `auto` is the fastest.
    - `log_texts`: keep the rows' inputs in the samples.
    - `compare_to`: the label of a row that the report is to compare with. The run only checks that there will be one.
    """

    only: Sequence[str] | None = None
    limit: int | None = None
    harness: str = DEFAULT
    tune: bool = False
    matrix: bool = False
    device: str | None = None
    log_texts: bool = False
    compare_to: str | None = None


ALL = RunOptions()


def run_suite(suite: Suite, out: Path, options: RunOptions = ALL, *, progress: Progress | None = None) -> Board:
    """Run those of a suite's cells that `out` does not hold yet; return all of the suite's cells that it then holds.

    A method that raises UnsuitedError, or whose model comes to NaN or inf, is skipped, with its reason: it has no cell
    in the result, not even for a task that it could do.

    Args:
        suite: what to run.
        out: where cells, samples, generated rows, built twins and their routers' features go.
        options: what is wanted of the suite.
        progress: where the bars go, and a line for each new cell.

    Raises:
        InputError: an unknown method or device, wrong rows, experts or options: before anything is run where it can be
            known.
    """
    run, asked, work = _ready(suite, out, options, progress)
    cells, skipped = _run(run, work)
    return board_of(run, asked, cells, skipped)


def plan_suite(suite: Suite, out: Path, options: RunOptions = ALL, *, progress: Progress | None = None) -> Forecast:
    """Return what `run_suite` would take and what its rows could show. No cell is scored. Errors are those of a run."""
    run, _, work = _ready(suite, out, options, progress)
    return forecast(run, work)


def _ready(
    suite: Suite, out: Path, options: RunOptions, progress: Progress | None
) -> tuple[Run, Sequence[Entry], Work]:
    """Return a run that is checked, the entries that are asked for, and what is to be computed."""
    asked = suite.entries(None if options.only is None else list(options.only))
    check_names(suite.kinds)
    suite = run_inputs.located(suite)
    scorer, device = find_harness(options.harness), str(usable_device(options.device))
    if options.tune:
        _check_tunable(suite, scorer)
        asked = with_tuned(asked)
    shown = progress or Progress(disable=True)

    def trial(held_out: Suite) -> Board:
        return run_suite(held_out, out / "tuning", RunOptions(harness=options.harness, device=device), progress=shown)

    rows = suite.rows if options.limit is None else options.limit
    run = prepared(suite, asked, out, scorer, rows, device, options.log_texts, shown, trial)
    _check(run, asked)
    labels = [entry.label for entry in listed_entries(suite, asked, run.cells.labels())]
    if options.compare_to not in (None, *labels):
        raise InputError(f"--compare-to {options.compare_to}: no such row{nearest(str(options.compare_to), labels)}")
    work = [(protocol, entry) for protocol in suite.protocol for entry in asked if entry.runs_under(protocol)]
    if options.matrix:
        work += [(MATRIX_PROTOCOL, entry) for entry in matrix_entries(suite)]
    return run, asked, work


def _check_tunable(suite: Suite, harness: Harness) -> None:
    """Raise an InputError if a harness or a task does not score held-out training rows."""
    if harness.scores_own_rows:
        raise InputError(
            f"--tune chooses options on held-out training rows, which --harness {harness.name} does not score; leave "
            "it out"
        )
    named = [name for name, task in suite.kinds.items() if isinstance(task, NamedTask)]
    if named:
        raise InputError(f"--tune chooses options on held-out training rows, and {named[0]} is scored on its own alone")


def _run(run: Run, work: Work) -> tuple[dict[Line, list[Cell]], list[Skipped]]:
    """Compute what is wanted. Return each line's cells and the methods that do not suit the experts."""
    suite, cells, skipped = run.suite, dict[Line, list[Cell]](), list[Skipped]()
    total = sum(run.count(entry) for _, entry in work)
    bar = run.progress.add_task("cells", total=total)
    for protocol, entry in work:
        run.progress.update(bar, description=f"{protocol} {entry.label}")
        own: list[Cell] = []
        try:
            for cell in cells_of(run, entry, protocol):
                own.append(cell)
                run.progress.advance(bar, 1 if run.count(entry) else 0)
                if cell.measured == run.started:
                    _say(run, cell, bar)
            cells[protocol, entry.label] = own
        except (UnsuitedError, NotFiniteError) as error:
            if entry.track == "bound":
                raise
            skipped.append(Skipped(suite.name, protocol, entry.label, entry.track, str(error)))
        run.progress.advance(bar, max(run.count(entry) - len(own), 0))
    return cells, skipped


def _say(run: Run, cell: Cell, bar: TaskID) -> None:
    """Print a line for a new cell above the bars, also where the output is no terminal."""
    if run.progress.disable:
        return
    task = run.progress.tasks[bar]
    error = "" if cell.stderr is None else f" ± {cell.stderr:.2f}"
    seed = f", seed {cell.seed}" if run.suite.seeds > 1 else ""
    run.progress.console.print(
        f"{task.completed:.0f}/{task.total:.0f} {cell.protocol} {cell.method} {cell.task}{seed}: {cell.metric} "
        f"{cell.score:.2f}{error} ({cell.n} rows, {cell.seconds:.1f} s)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _check(run: Run, entries: Sequence[Entry]) -> None:
    """Raise an InputError for anything wrong with rows and options. Scoring can take hours."""
    check_rows(run.tasks.values(), trained=any(reads_own_rows(entry, run.suite) for entry in entries))
    entered = working(run, entries)
    for entry, context in entered:
        check_options(entry, context)
    check_routers(entered)
    if not run.harness.scores_own_rows:
        check_training(entered)
