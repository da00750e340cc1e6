"""What a run has computed so far, and its progress bar."""

from __future__ import annotations

from collections.abc import Sequence

from twin_bench.leaderboard.board import Line
from twin_bench.leaderboard.prepared import Run
from twin_bench.leaderboard.suite import Entry
from twin_bench.protocols import ProtocolName
from twin_bench.results.cells import Cell, Skipped

Asked = tuple[ProtocolName, Entry]
"""An entry under a protocol: a line of the table that is to be computed."""
SHOWN = 3
"""How many lines that are computed at the same time the bar names."""


class Tally:
    """The cells and the methods that were passed over, of a run's lines. It moves the run's bar.

    `cells` are those of the lines that are complete, `skipped` the methods that have none.
    """

    def __init__(self, run: Run, work: Sequence[Asked]) -> None:
        """Show a bar of all cells of `work`."""
        self.cells: dict[Line, list[Cell]] = {}
        self._run, self._work = run, list(work)
        self._found: dict[Line, list[Cell]] = {}
        self._passed_over: dict[Line, Skipped] = {}
        total = sum(run.count(entry) for _, entry in work)
        self._bar = run.progress.add_task("cells", total=total)

    @property
    def skipped(self) -> list[Skipped]:
        """The methods that were passed over, in the order of the work."""
        lines = [(protocol, entry.label) for protocol, entry in self._work]
        return [self._passed_over[line] for line in lines if line in self._passed_over]

    def working_on(self, lines: Sequence[Asked]) -> None:
        """Show which lines are being computed."""
        named = [f"{protocol} {entry.label}" for protocol, entry in lines]
        more = len(named) - SHOWN
        description = ", ".join(named[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        self._run.progress.update(self._bar, description=description or "cells")

    def add(self, line: Asked, cell: Cell) -> None:
        """Count a cell of a line, and say a new one. A cell that was added before is passed over."""
        protocol, entry = line
        own = self._found.setdefault((protocol, entry.label), [])
        if any(cell.key == other.key for other in own):
            return
        own.append(cell)
        self._run.progress.advance(self._bar, 1 if self._run.count(entry) else 0)
        if cell.measured == self._run.started:
            self._say(cell)

    def complete(self, line: Asked) -> None:
        """Note that a line has all cells that it will have."""
        protocol, entry = line
        place = protocol, entry.label
        own = self._found.get(place, [])
        if place not in self._passed_over:
            self.cells[place] = own
        self._run.progress.advance(self._bar, max(self._run.count(entry) - len(own), 0))

    def pass_over(self, line: Asked, reason: str, *, failed: bool = False) -> None:
        """Note that a line has no row in the table, and why. `failed` says that an error ended it."""
        protocol, entry = line
        skipped = Skipped(self._run.suite.name, protocol, entry.label, entry.track, reason, failed)
        self._passed_over[protocol, entry.label] = skipped

    def _say(self, cell: Cell) -> None:
        """Print a line for a new cell above the bars, also where the output is no terminal."""
        progress = self._run.progress
        if progress.disable:
            return
        task = progress.tasks[self._bar]
        error = "" if cell.stderr is None else f" ± {cell.stderr:.2f}"
        seed = f", seed {cell.seed}" if self._run.suite.seeds > 1 else ""
        progress.console.print(
            f"{task.completed:.0f}/{task.total:.0f} {cell.protocol} {cell.method} {cell.task}{seed}: {cell.metric} "
            f"{cell.score:.2f}{error} ({cell.n} rows, {cell.seconds:.1f} s)",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
