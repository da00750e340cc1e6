"""A job of a sweep: lines that have the same cells, and where these are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from twin_bench.leaderboard.board import Line
from twin_bench.leaderboard.prepared import Run
from twin_bench.leaderboard.scoring import with_options
from twin_bench.leaderboard.tally import Asked, Tally
from twin_bench.results.cells import Cells


class Place(NamedTuple):
    """Where a cell is written: a directory's cells, and the arguments of `Cells.read`."""

    cells: Cells
    protocol: str
    method: str
    task: str
    key: str


@dataclass
class Job:
    """Lines that have the same cells: a protocol may change nothing for an entry.

    `keys` are those of all cells, `unseen` the places of cells that nobody has seen yet, and `deaths` says how many
    workers have died at the job.
    """

    lines: list[Asked]
    keys: list[str]
    unseen: list[Place]
    deaths: int = 0

    @property
    def name(self) -> Line:
        """The protocol and the label of the first line."""
        protocol, entry = self.lines[0]
        return protocol, entry.label

    @property
    def bound(self) -> bool:
        """Whether no table can be made without the job."""
        return self.lines[0][1].track == "bound"

    def look(self, tally: Tally) -> bool:
        """Tell the tally of cells that were not seen before. Return whether all are there."""
        unseen = []
        for place in self.unseen:
            cell = place.cells.read(*place[1:])
            if cell is None:
                unseen.append(place)
            else:
                tally.add(self.lines[0], cell)
        self.unseen = unseen
        return not unseen


def job_of(run: Run, line: Asked) -> Job:
    """Return the job of a line. Options that are to be tuned are chosen first, on a run of their own.

    Raises:
        UnsuitedError: options can't be chosen with these experts or rows.
        InputError: a method has failed where options were chosen.
    """
    listed, given = line
    protocol, places = run.computed_under(given, listed), list[Place]()
    for own in run.of_each_seed(given):
        entry = with_options(own, given, protocol)
        for task in own.answered(entry):
            places.append(Place(own.cells, protocol, entry.label, task, own.key(entry, protocol, task)))
    return Job([line], [place.key for place in places], places)
