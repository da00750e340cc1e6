"""What a run would take and what it could show, before it starts: cells, rows, time, and the difference seen at 80%."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from twin_bench.contenders import contenders
from twin_bench.contenders.references import ReferenceMethod
from twin_bench.data.rows import TaskRows
from twin_bench.errors import InputError
from twin_bench.leaderboard.harness import Job
from twin_bench.leaderboard.prepared import Run
from twin_bench.leaderboard.suite import Entry, entry_of
from twin_bench.protocols import ProtocolName
from twin_bench.statistics.power import DISCORDANT, detectable_difference, detectable_mean_difference

PROBE_ROWS = 32
"""How many rows of a task the base model answers to be timed, and half as many in a run before."""
REPEATS = 3
"""How often a run of the probe is timed, at most."""
ENOUGH = 1.0
"""Seconds of timed runs after which there is no other."""
ROUTED = 2
"""How much longer a row takes where it is routed as well: a forward of the router's and one of the fused model."""


@dataclass(frozen=True)
class TaskForecast:
    """A task's rows (None if only the harness knows), cells to be scored, seconds, and what difference can be seen."""

    task: str
    rows: int | None
    cells: int
    missing: int
    seconds: float
    detectable: float | None


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run. `detectable` is of the normalized mean, in points; None if rows are not known."""

    tasks: Sequence[TaskForecast]
    detectable: float | None

    @property
    def seconds(self) -> float:
        """The seconds of all cells that are to be scored. Merges, builds and routers' training are not counted."""
        return math.fsum(task.seconds for task in self.tasks)


class Cost(NamedTuple):
    """The seconds that scoring a cell takes, whatever its rows are, and those of each row."""

    cell: float
    row: float


class Clock(NamedTuple):
    """Clocks in seconds: of the time that passes, and of the processor time that this process takes."""

    wall: Callable[[], float] = time.perf_counter
    processor: Callable[[], float] = time.process_time


CLOCK = Clock()


def timed(score: Callable[[int], object], rows: int, *, on_processor: bool, clock: Clock = CLOCK) -> Cost:
    """Return what scoring costs, from runs on `rows` rows and on half of them.

    Each number of rows is run up to REPEATS times, and the shortest run counts, because whatever else the machine does
    makes runs longer. What runs on the processor alone takes no longer than its processor time where nothing else runs.

    Args:
        score: scores so many rows.
        rows: how many rows the longer run has, at least 1.
        on_processor: whether the model runs on the processor. A GPU's work is no processor time.
        clock: the clocks.
    """

    def shortest(count: int) -> float:
        taken = list[float]()
        began = clock.wall()
        while not taken or (len(taken) < REPEATS and clock.wall() - began < ENOUGH):
            wall, processor = clock.wall(), clock.processor()
            score(count)
            wall, processor = clock.wall() - wall, clock.processor() - processor
            taken.append(min(wall, processor) if on_processor else wall)
        return min(taken)

    half = max(1, rows // 2)
    score(half)  # loads what is loaded once
    few, many = shortest(half), shortest(rows)
    row = (many - few) / (rows - half) if rows > half and many > few else many / rows
    return Cost(max(0.0, many - rows * row), row)


def forecast(run: Run, work: Sequence[tuple[ProtocolName, Entry]]) -> Forecast:
    """Return what scoring `work`, entries under protocols, would take. Nothing is written.

    Rows are timed with the base model, on a few rows of each task and through the harness (see `timed`). References
    take no time and are not counted.
    """
    modelled = [(protocol, entry) for protocol, entry in work if not isinstance(entry.method, ReferenceMethod)]
    costs, found = _costs(run), list[TaskForecast]()
    for task, rows in run.tasks.items():
        count = run.harness.row_count(rows)
        count = count if run.rows is None or count is None else min(run.rows, count)
        cells = _cells(run, modelled, task)
        missing = [entry for entry, done in cells.values() if not done]
        parts = sum(ROUTED if entry.track == "per-input" else 1 for entry in missing)
        detectable = None if count is None else 100 * detectable_difference(count)
        seconds = len(missing) * costs[task].cell + parts * (count or 0) * costs[task].row
        found.append(TaskForecast(task, count, len(cells), len(missing), seconds, detectable))
    owned = [one.rows for one in found if run.tasks[one.task].task.expert is not None]
    known = [rows for rows in owned if rows is not None]
    return Forecast(found, detectable_mean_difference(known) if known and len(known) == len(owned) else None)


def _cells(
    run: Run, work: Sequence[tuple[ProtocolName, Entry]], task: str
) -> dict[tuple[str, str], tuple[Entry, bool]]:
    """Return a task's cells by label and key, each with its entry and whether it is finished.

    An entry that is to be tuned has a key once its options are chosen, so it counts as not finished.
    """
    found: dict[tuple[str, str], tuple[Entry, bool]] = {}
    for listed, entry in work:
        protocol = run.computed_under(entry, listed)
        for own in run.of_each_seed(entry) if task in run.answered(entry) else ():
            key = own.key(entry, protocol, task)
            done = not entry.to_tune and own.cells.read(protocol, entry.label, task, key) is not None
            found[entry.label, key] = entry, done
    return found


def _costs(run: Run) -> Mapping[str, Cost]:
    entry, found = entry_of("pretrained"), dict[str, Cost]()
    (contender,) = contenders(entry.method, run.context(entry, "standard"))
    contender.twin.to(run.device)
    workspace = run.out / run.harness.name

    def score(rows: TaskRows, count: int) -> None:
        with contextlib.suppress(InputError):  # so few rows may have no score, such as an AUROC of one label
            run.harness.score(contender, Job(f"probe-{entry.label}", rows, run.suite, workspace, count))

    for name, rows in run.tasks.items():
        known = run.harness.row_count(rows) or PROBE_ROWS
        count = min(run.rows or PROBE_ROWS, known, PROBE_ROWS)
        found[name] = timed(partial(score, rows), count, on_processor=run.device_kind == "cpu")
    return found


def described(planned: Forecast, suite: str) -> str:
    """Return a forecast in words and as a table, for a terminal."""
    lines = [
        f"{suite}: {sum(task.missing for task in planned.tasks)} of {sum(task.cells for task in planned.tasks)} cells "
        f"are to be scored; about {_time(planned.seconds)} on this machine, merges, builds and routers' training not "
        "counted.",
        "",
        f"{'task':<20} {'rows':>7} {'cells':>6} {'to score':>9} {'time':>8}  difference seen at 80% power",
    ]
    for task in planned.tasks:
        seen = "" if task.detectable is None else f"{task.detectable:.1f} points"
        rows = "?" if task.rows is None else f"{task.rows:,}"
        time = _time(task.seconds)
        lines.append(f"{task.task:<20} {rows:>7} {task.cells:>6} {task.missing:>9} {time:>8}  {seen}")
    if planned.detectable is not None:
        lines += ["", f"Normalized mean: a difference of {planned.detectable:.1f} points is seen at 80% power."]
    lines.append(
        "Time: it is assumed that nothing else runs here, that every method takes as long as the base model, and "
        f"{ROUTED} times as long a row where it is routed. The base model was timed on up to {PROBE_ROWS} rows of each "
        "task. The shortest of several runs counts, in processor time where that is less."
    )
    lines.append(
        f"It is assumed that scores are accuracies and that two methods differ on {100 * DISCORDANT:.0f}% of the rows "
        "(two-sided, 5%), and of the mean that the experts are right on all rows. Correlations and F1 need more rows."
    )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
