"""Cells: one method's score on one task, written to disk the moment it is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from twin_bench.files import write_text


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
    build_seconds: float
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
        """Return a finished cell, or None where there is none or what decides its score has changed."""
        try:
            stored = json.loads(self._file(protocol, method, task).read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return Cell(**stored) if stored.get("key") == key else None

    def write(self, cell: Cell) -> None:
        """Write a cell atomically: it is there whole or not at all."""
        write_text(self._file(cell.protocol, cell.method, cell.task), json.dumps(asdict(cell), indent=2) + "\n")

    def _file(self, protocol: str, method: str, task: str) -> Path:
        return self.directory / protocol / method / f"{task}.json"
