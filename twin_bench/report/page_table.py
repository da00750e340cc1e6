"""The page's table, and what each of its cells opens: plain data for the template and for the script."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twin_bench.report.answer import ordered
from twin_bench.report.numbers import (
    count,
    duration,
    group,
    interval,
    known,
    parameters,
    points,
    ranks,
    score,
    size,
    times,
)
from twin_bench.report.wrong_rows import Place
from twin_bench.results.board import Leaderboard


@dataclass(frozen=True)
class Column:
    """A column of the table. `task` is its task, if it shows a task's scores. `numeric` ones sort as numbers."""

    label: str
    task: str = ""
    numeric: bool = True
    shown: bool = True


@dataclass(frozen=True)
class Entry:
    """What a cell shows: its text, the number it is sorted by, and the cell that it opens (-1: none)."""

    text: str
    aside: str = ""
    value: float | str = ""
    opens: int = -1


@dataclass
class Table:
    """The table: columns, one line a protocol and method, and the details of the cells of tasks.

    `details` is what the script shows of a cell. Equal settings, notes and versions are held once, in `shared`.
    """

    columns: list[Column]
    lines: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    shared: list[Any] = field(default_factory=list)
    tracks: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def hold(self, value: Any) -> int:
        """Return where a value is held in `shared`."""
        plain = _plain(value)
        text = json.dumps(plain)
        if text not in self._places:
            self._places[text] = len(self.shared)
            self.shared.append(plain)
        return self._places[text]


def table(board: Leaderboard, samples: Mapping[Place, int]) -> Table:
    """Return the table of a leaderboard. `samples` says where a cell's wrong rows stand, if it has any."""
    tasks = list(dict.fromkeys(board.tasks["task"]))
    found = Table(_columns(board, tasks), tasks=tasks, tracks=list(dict.fromkeys(board.summary["track"])))
    cells = {(row["protocol"], row["method"], row["task"]): row for row in board.cells.to_dict("records")}
    for protocol in board.protocols:
        for row in ordered(board, protocol).to_dict("records"):
            own = [
                _scored(cells.get((protocol, row["method"], task)), found, samples)  # a bound may lack a task
                for task in tasks
            ]
            line = {"protocol": protocol, "track": row["track"], "method": row["method"]}
            found.lines.append(
                line | {"told": row["told_the_task"], "bound": row["bound"], "entries": _line(row, own, board)}
            )
    return found


def _columns(board: Leaderboard, tasks: list[str]) -> list[Column]:
    retention = [Column("retention")] if board.summary["retention"].notna().any() else []
    return [
        Column("method", numeric=False),
        Column("rank"),
        Column("group", numeric=False),
        Column("normalized"),
        Column("gain"),
        *retention,
        *(Column(task, task=task) for task in tasks),
        Column("track", numeric=False),
        Column("protocol", numeric=False),
        Column("storage"),
        Column("kept", shown=False),
        Column("parameters", shown=False),
        Column("build"),
        Column("build memory", shown=False),
        Column("model time a row"),
    ]


def _line(row: Mapping[str, Any], scores: list[Entry], board: Leaderboard) -> list[Entry]:
    kept = _with_interval(row["retention"], row["retention_ci_low"], row["retention_ci_high"])
    retention = [kept] if board.summary["retention"].notna().any() else []
    place = ranks(row["rank_low"], row["rank_high"]) if known(row["rank_low"]) else ""
    letter = group(row["tie_group"], told=bool(row["told_the_task"]))
    return [
        Entry(row["method"], value=row["method"]),
        Entry(place, value=_key(row["rank_low"])),
        Entry(letter, value=letter or "~"),
        _with_interval(row["normalized"], row["ci_low"], row["ci_high"]),
        _with_interval(row["gain"], row["gain_ci_low"], row["gain_ci_high"]),
        *retention,
        *scores,
        Entry(row["track"], value=row["track"]),
        Entry(row["protocol"], value=row["protocol"]),
        _number(row["relative_storage"], times),
        _number(row["stored_bytes"], size),
        _number(row["parameters"], parameters),
        _number(row["build_seconds"], duration),
        _number(row["build_peak_bytes"], size),
        _number(row["model_seconds_per_row"], duration),
    ]


def _scored(cell: Mapping[str, Any] | None, found: Table, samples: Mapping[Place, int]) -> Entry:
    """Return a task's entry, and keep what it opens."""
    if cell is None:
        return Entry("")
    place = cell["protocol"], cell["method"], cell["task"]
    detail = {
        "protocol": place[0],
        "method": place[1],
        "task": place[2],
        "facts": _facts(cell),
        "settings": found.hold(cell["settings"]),
        "notes": found.hold(cell["notes"]),
        "versions": found.hold(cell["versions"]),
        "rows": samples.get(place, -1),
    }
    found.details.append(detail)
    shown = _with_interval(cell["score"], cell["ci_low"], cell["ci_high"], percent=cell["percent"])
    return Entry(shown.text, shown.aside, shown.value, len(found.details) - 1)


def _facts(cell: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is said of a cell beside its settings and notes, those facts alone that are known."""
    percent = cell["percent"]
    seeds = list(cell["seed_scores"]) if cell["seeds"] > 1 else []
    each = ", ".join(score(one, percent=percent) for one in seeds)
    drawn = f"{len(seeds)} ({each}); the rows that it got wrong are the first seed's" if seeds else ""
    gain, normalized, retention = (points(cell[name]) for name in ("gain", "normalized", "retention"))
    facts = [
        ("score", interval(cell["score"], cell["ci_low"], cell["ci_high"], percent=percent)),
        ("standard error", f"{cell['stderr']:.2g}" if known(cell["stderr"]) else ""),
        ("metric", f"{cell['metric']}{'' if cell['higher_is_better'] else ' (less is better)'}"),
        ("rows", count(cell["n"])),
        ("normalized", normalized if known(cell["normalized"]) else ""),
        ("gain", gain if known(cell["gain"]) else ""),
        ("constant answer", score(cell["floor"], percent=percent) if known(cell["floor"]) else ""),
        ("retention", retention if known(cell["retention"]) else ""),
        ("expert", cell["expert"] if isinstance(cell["expert"], str) else "none"),
        ("seed", str(cell["seed"])),
        ("seeds", drawn),
        ("track", cell["track"]),
        ("evaluation", duration(cell["seconds"]) if known(cell["seconds"]) else ""),
        ("device", cell["device"]),
        ("digest", cell["key"]),
    ]
    return [(name, text) for name, text in facts if text]


def _with_interval(value: float, low: float, high: float, *, percent: bool = True) -> Entry:
    text = interval(value, low, high, percent=percent) if known(value) else ""
    shown, _, aside = text.partition(" ")
    return Entry(shown, aside, _key(value))


def _number(value: float, write: Any) -> Entry:
    return Entry(write(value) if known(value) else "", value=_key(value))


def _key(value: Any) -> float | str:
    return round(float(value), 6) if known(value) else ""


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are no numbers become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
