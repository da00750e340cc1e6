"""Cells: one method's score on one task, written to disk the moment it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from twin_bench.files import read_record, write_record

FORMAT = 2
"""The format of a cell's file. It is raised with every change of a cell's fields or of what they mean."""


@dataclass(frozen=True)
class Cell:
    """A score with all it takes to read it.

    `score` and `stderr` are in points (0 to 100, correlations down to -100) over `n` rows; `seconds` is the
    evaluation's wall time, `build_seconds` the merge's or build's, `parameters` what the method stores.
    `key` is a digest of everything that decides the score.
    """

    suite: str
    protocol: str
    method: str
    track: str
    task: str
    metric: str
    score: float
    stderr: float
    n: int
    seed: int
    seconds: float
    build_seconds: float | None
    parameters: int
    settings: Mapping[str, Any]
    notes: Mapping[str, Any]
    key: str


@dataclass(frozen=True)
class Skipped:
    """A method that these experts or rows don't suit: it has no row, and `reason` says why."""

    suite: str
    protocol: str
    method: str
    track: str
    reason: str


class Board(NamedTuple):
    """What a suite came to: its cells, and the methods that have none."""

    cells: Sequence[Cell]
    skipped: Sequence[Skipped] = ()


class Cells:
    """The finished cells of one leaderboard directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, protocol: str, method: str, task: str, key: str) -> Cell | None:
        """Return a finished cell; None where there is none, or what decides its score has changed.

        A cell of an older format, or a damaged one, is None as well: it is run again.
        """
        stored = read_record(self._file(protocol, method, task), format_number=FORMAT)
        return Cell(**stored) if stored is not None and stored["key"] == key else None

    def write(self, cell: Cell) -> None:
        """Write a cell atomically: it is there whole or not at all."""
        write_record(self._file(cell.protocol, cell.method, cell.task), asdict(cell), format_number=FORMAT)

    def _file(self, protocol: str, method: str, task: str) -> Path:
        return self.directory / protocol / method / f"{task}.json"
