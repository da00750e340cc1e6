"""Cells: one method's score on one task, written to disk as soon as it is computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from twin_bench.files import read_record, write_record
from twin_bench.results.samples import Samples, write_samples

FORMAT = 5
"""The format of a cell's file. It is raised when a cell's fields, their meaning or the file's name change."""


PACKAGES = ("twin-bench", "torch", "transformers", "peft", "lm-eval", "crfm-helm", "scikit-learn", "scipy")
"""The packages that take part in a score."""
DEFAULT_HARNESS = "lm-eval"
"""The harness whose cells need no folder of their own."""


@dataclass(frozen=True)
class Cell:
    """A score with everything that is needed to read it.

    `expert` is the task's expert, or None if the task is nobody's. `score` and `stderr` are in points (0 to 100,
    correlations down to -100), or in the metric's own unit where it is no fraction, over `n` rows; `stderr` is None
    where it is not known. `higher_is_better` and `percent` say how the score is read: whether more is better, and
    whether it is a fraction, shown times 100. `seconds` is the wall time of the evaluation, the harness included,
    `model_seconds` the model's own time of it, and `build_seconds` the time of the merge or build. `model_seconds` is
    None where nobody measured it or the machine was busy with something else. `build_peak_bytes` is how much more
    memory the build held at its peak than the process before it. `parameters` and `stored_bytes` are what the method
    keeps for inference, and `relative_storage` is the latter over the bytes of one model. `measured` is when the run
    that computed the cell began. `device` is the kind of device that answered, and `versions` are those of the packages
    that took part. `key` is a digest of everything that decides the score. `samples` is the file of the rows' answers,
    as a path in the leaderboard's directory, or None if the harness gives none.
    """

    suite: str
    protocol: str
    method: str
    track: str
    task: str
    expert: str | None
    metric: str
    higher_is_better: bool
    percent: bool
    score: float
    stderr: float | None
    n: int
    seed: int
    seconds: float
    model_seconds: float | None
    build_seconds: float | None
    build_peak_bytes: int | None
    parameters: int
    stored_bytes: int | None
    relative_storage: float | None
    settings: Mapping[str, Any]
    notes: Mapping[str, Any]
    device: str
    measured: str
    versions: Mapping[str, str]
    key: str
    samples: str | None


@dataclass(frozen=True)
class Skipped:
    """A method that has no row in the table, and the `reason`: it does not suit these experts or rows, or it failed."""

    suite: str
    protocol: str
    method: str
    track: str
    reason: str
    failed: bool = False


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Return the versions of those PACKAGES that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Board(NamedTuple):
    """The result of a suite: its cells, the methods that were skipped, and sentences to be read with the table.

    `identity` says what was compared: the suite, its models and rows, versions, date. `methods` are the headers of the
    methods by label. `matrix` are the cells of every expert on every task, if they were asked for.
    """

    cells: Sequence[Cell]
    skipped: Sequence[Skipped] = ()
    left_out: Sequence[str] = ()
    identity: Mapping[str, Any] = MappingProxyType({})
    methods: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    matrix: Sequence[Cell] = ()


def left_out(missing: Sequence[str], idle: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return a sentence for each kind of row that a table lacks."""
    sentences = {
        "Not run on these rows: {}. A run without --methods adds them.": missing,
        "Under none of the suite's protocols: {}.": idle,
        "The directory also holds cells of other rows, limits, weights, options or versions: {}.": others,
    }
    return [sentence.format(", ".join(names)) for sentence, names in sentences.items() if names]


def harnesses_in(out: Path) -> list[str]:
    """Return the names of the harnesses that have cells in a directory."""
    folders = [folder.name for folder in out.glob("cells*") if any(folder.glob("*/*/*.json"))]
    return [DEFAULT_HARNESS if name == "cells" else name.removeprefix("cells-") for name in folders]


class Cells:
    """The finished cells of one leaderboard directory, and the samples that they are made of.

    A file's name holds the start of its cell's key. So a run with other rows, limits or options adds cells and
    overwrites none. Each harness has folders of its own.
    """

    def __init__(self, out: Path, harness: str = DEFAULT_HARNESS) -> None:
        own = harness != DEFAULT_HARNESS
        self.out, self.directory = out, out / (f"cells-{harness}" if own else "cells")
        self._samples = Path("samples", harness) if own else Path("samples")

    def read(self, protocol: str, method: str, task: str, key: str) -> Cell | None:
        """Return a finished cell. It is None if there is none, or if something that decides its score has changed.

        A cell that is damaged, of an older format or without its samples is None as well, so it is run again.
        """
        stored = read_record(self._file(protocol, method, task, key), format_number=FORMAT)
        if stored is None or stored.get("key") != key or stored.keys() != {field.name for field in fields(Cell)}:
            return None
        cell = Cell(**stored)
        return None if cell.samples is not None and not (self.out / cell.samples).is_file() else cell

    def write(self, cell: Cell, samples: Samples | None) -> Cell:
        """Write a cell and its samples, each atomically and the cell last. Return the cell with its samples' path."""
        if samples is not None:
            folder = self._samples / cell.protocol / cell.method
            cell = replace(cell, samples=(folder / f"{cell.task}-{cell.key[:16]}.parquet").as_posix())
            write_samples(self.out / str(cell.samples), samples)
        write_record(self._file(cell.protocol, cell.method, cell.task, cell.key), asdict(cell), format_number=FORMAT)
        return cell

    def labels(self) -> list[str]:
        """Return the labels of the methods that have a finished cell of any key, under any protocol."""
        return sorted({folder.name for folder in self.directory.glob("*/*") if folder.is_dir()})

    def others(self, shown: Iterable[Cell]) -> list[str]:
        """Return METHOD (PROTOCOL) for all that have a finished cell which is not among `shown`."""
        known = {self._file(cell.protocol, cell.method, cell.task, cell.key) for cell in shown}
        files = set(self.directory.glob("*/*/*.json")) - known
        return sorted({f"{file.parent.name} ({file.parent.parent.name})" for file in files})

    def _file(self, protocol: str, method: str, task: str, key: str) -> Path:
        return self.directory / protocol / method / f"{task}-{key[:16]}.json"
