"""A run made ready: what is asked for, found and checked, before the first cell is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from twin_bench.data.named import NamedTask
from twin_bench.errors import InputError, nearest
from twin_bench.leaderboard import inputs as run_inputs
from twin_bench.leaderboard.board import MATRIX_PROTOCOL, listed_entries, matrix_entries, working
from twin_bench.leaderboard.checks import check_names, check_options, check_rows
from twin_bench.leaderboard.harness import DEFAULT, Harness, find_harness
from twin_bench.leaderboard.prepared import Run, prepared
from twin_bench.leaderboard.suite import Entry, Suite
from twin_bench.leaderboard.tally import Asked
from twin_bench.leaderboard.training import check_routers, check_training, reads_own_rows
from twin_bench.leaderboard.tune import with_tuned
from twin_bench.results.cells import Board


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


@dataclass(frozen=True)
class Ready:
    """A run that is checked.

    `suite` and `options` are what it is made of, `asked` are the entries that are asked for, and `work` is what is to
    be computed.
    """

    suite: Suite
    options: RunOptions
    run: Run
    asked: Sequence[Entry]
    work: Sequence[Asked]


def made_ready(
    suite: Suite, out: Path, options: RunOptions, progress: Progress, trial: Callable[[Suite], Board]
) -> Ready:
    """Return a run that is checked.

    Args:
        suite: what to run.
        out: the directory of results.
        options: what is wanted of the suite, with a device that is there.
        progress: where bars go.
        trial: runs another suite in the same way, for --tune.

    Raises:
        InputError: anything that is wrong with suite, rows, experts or options.
    """
    given = suite
    asked = suite.entries(None if options.only is None else list(options.only))
    check_names(suite.kinds)
    suite = run_inputs.located(suite)
    scorer = find_harness(options.harness)
    if options.tune:
        _check_tunable(suite, scorer)
        asked = with_tuned(asked)
    rows = suite.rows if options.limit is None else options.limit
    run = prepared(suite, asked, out, scorer, rows, str(options.device), options.log_texts, progress, trial)
    _check(run, asked)
    labels = [entry.label for entry in listed_entries(suite, asked, run.cells.labels())]
    if options.compare_to not in (None, *labels):
        raise InputError(f"--compare-to {options.compare_to}: no such row{nearest(str(options.compare_to), labels)}")
    work = [(protocol, entry) for protocol in suite.protocol for entry in asked if entry.runs_under(protocol)]
    if options.matrix:
        work += [(MATRIX_PROTOCOL, entry) for entry in matrix_entries(suite)]
    return Ready(given, options, run, asked, work)


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


def _check(run: Run, entries: Sequence[Entry]) -> None:
    """Raise an InputError for anything wrong with rows and options. Scoring can take hours."""
    check_rows(run.tasks.values(), trained=any(reads_own_rows(entry, run.suite) for entry in entries))
    entered = working(run, entries)
    for entry, context in entered:
        check_options(entry, context)
    check_routers(entered)
    if not run.harness.scores_own_rows:
        check_training(entered)
