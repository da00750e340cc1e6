"""Run a suite: every method on every task through a harness, one finished cell at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from rich.progress import Progress

from twin_bench.errors import InputError
from twin_bench.files import remove_abandoned
from twin_bench.leaderboard.board import board_of
from twin_bench.leaderboard.executors import Executor, Given, Local
from twin_bench.leaderboard.forecast import Forecast, forecast
from twin_bench.leaderboard.ready import ALL, Ready, RunOptions, made_ready
from twin_bench.leaderboard.suite import Suite
from twin_bench.leaderboard.tally import Tally
from twin_bench.results.cells import Board

__all__ = ["ALL", "RunOptions", "plan_suite", "run_suite"]


def run_suite(
    suite: Suite,
    out: Path,
    options: RunOptions = ALL,
    *,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Board:
    """Run those of a suite's cells that `out` does not hold yet; return all of the suite's cells that it then holds.

    A method that raises UnsuitedError, or whose model comes to NaN or inf, is skipped, with its reason: it has no cell
    in the result, not even for a task that it could do. So is one that fails in a worker.

    Args:
        suite: what to run.
        out: where cells, samples, generated rows, built twins and their routers' features go.
        options: what is wanted of the suite.
        progress: where the bars go, and a line for each new cell.
        executor: where lines are computed, opened. By default it is this process.

    Raises:
        InputError: an unknown method or device, wrong rows, experts or options: before anything is run where it can be
            known.
    """
    executor = executor or Local(Given())
    ready = _ready(suite, out, options, progress, executor)
    tally = Tally(ready.run, ready.work)
    executor.compute(ready, tally)
    return board_of(ready.run, ready.asked, tally.cells, tally.skipped)


def plan_suite(suite: Suite, out: Path, options: RunOptions = ALL, *, progress: Progress | None = None) -> Forecast:
    """Return what `run_suite` would take and what its rows could show. No cell is scored. Errors are those of a run."""
    ready = _ready(suite, out, options, progress, Local(Given()))
    return forecast(ready.run, ready.work)


def _ready(suite: Suite, out: Path, options: RunOptions, progress: Progress | None, executor: Executor) -> Ready:
    """Clear what killed runs have left, and return a run that is checked."""
    shown = progress or Progress(disable=True)
    options = dataclasses.replace(options, device=executor.device(options.device))
    remove_abandoned(out)
    return made_ready(suite, out, options, shown, _trial(out, options, shown, executor))


def _trial(out: Path, options: RunOptions, progress: Progress, executor: Executor) -> Callable[[Suite], Board]:
    """Return what runs a suite of held-out rows, for --tune. It raises an InputError where a method fails."""

    def trial(held_out: Suite) -> Board:
        wanted = RunOptions(harness=options.harness, device=options.device)
        board = run_suite(held_out, out / "tuning", wanted, progress=progress, executor=executor)
        for one in board.skipped:
            if one.failed:
                raise InputError(f"{one.method}: {one.reason}")
        return board

    return trial
