"""Options chosen on a held-out part of each task's training rows. Scored rows are never used.

A choice is kept in a record. So a later run without --tune still finds the row that an earlier one has tuned.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twin_bench.data.generative import shuffled
from twin_bench.data.rows import TaskRows, split_path
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.files import digest, digest_files, read_record, write_record, write_text
from twin_bench.leaderboard.suite import Entry, Suite
from twin_bench.protocols import ProtocolName
from twin_bench.results.cells import Board
from twin_bench.results.scores import normalized_means

HELD_OUT = 256
"""The largest number of held-out rows of a task."""
FORMAT = 1
"""The format of a choice. It is raised when options are chosen in another way."""


def to_tune(entry: Entry) -> Entry:
    """Return the row NAME+tuned of an entry whose method has a grid."""
    return dataclasses.replace(entry, label=f"{entry.label}+tuned", to_tune=True)


def with_tuned(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries. An entry whose method has a grid is followed by one to be tuned, NAME+tuned."""
    listed: list[Entry] = []
    for entry in entries:
        listed += [entry, to_tune(entry)] if entry.method.tune else [entry]
    labels = [entry.label for entry in listed]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"two methods are labelled {label!r}: --tune adds one; give yours another label")
    if len(listed) == len(entries):
        raise InputError("--tune: none of these methods has a grid to choose its options from; leave it out")
    return listed


def chosen(entry: Entry, workspace: Path, key: str) -> Entry | None:
    """Return `entry` with the options that an earlier run chose for it, or None if none did.

    Args:
        entry: one to be tuned.
        workspace: the folder of choices.
        key: a digest of everything that decides the choice, the grid aside.
    """
    stored = read_record(_choice_file(entry, workspace, key), format_number=FORMAT)
    return None if stored is None else _settled(entry, stored["tuned"])


def keep(entry: Entry, workspace: Path, key: str) -> None:
    """Write which options were chosen for `entry`, as `tuned` returns it, for `chosen` to find."""
    write_record(_choice_file(entry, workspace, key), dict(entry.notes), format_number=FORMAT)


def _choice_file(entry: Entry, workspace: Path, key: str) -> Path:
    grid = {name: list(options) for name, options in entry.method.tune.items()}
    return workspace / f"choice-{digest([key, grid])[:16]}.json"


def _settled(entry: Entry, notes: dict[str, Any]) -> Entry:
    return dataclasses.replace(entry, options={**entry.options, **notes["chosen"]}, notes={"tuned": notes})


def tuned(
    entry: Entry,
    protocol: ProtocolName,
    suite: Suite,
    tasks: Sequence[TaskRows],
    workspace: Path,
    run: Callable[[Suite], Board],
) -> Entry:
    """Return `entry` with the options of its method's grid that score best on held-out training rows.

    The best options have the largest mean over tasks of 100 x score / the expert's score on the same rows, as in the
    table. Among equals the first is taken. The entry's notes say what was chosen and from which values.

    Args:
        entry: what to tune. Options outside the grid keep their values.
        protocol: the protocol under which the options are chosen.
        suite: its experts and seed are used, and its `rows` limit how many rows are held out.
        tasks: its tasks, of which the rows in train.jsonl are used. Those that are nobody's are left out.
        workspace: the folder for the held-out rows.
        run: runs a suite, including its bounds.

    Raises:
        UnsuitedError: no task has an expert, a task with one has no training rows, the method does not suit the
            experts, or no expert scores above 0.
    """
    owned = [rows for rows in tasks if rows.task.expert is not None]
    if not owned:
        raise UnsuitedError("no task has an expert; options are chosen by the experts' tasks")
    rows = hold_out(owned, workspace, min(HELD_OUT, suite.rows or HELD_OUT), suite.seed)
    names, values = zip(*entry.method.tune.items(), strict=True)
    points = [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]
    trials = {f"{entry.label}.{index}": {**entry.options, **point} for index, point in enumerate(points)}
    held_out = suite.on_rows_of(rows, "validation")
    listed = [own.task.name for own in owned]
    board = run(
        held_out.model_copy(
            update={
                "tasks": {n: held_out.tasks[n] for n in listed} if isinstance(held_out.tasks, dict) else listed,
                "protocol": [protocol],
                "methods": [{label: {"method": entry.method.name, **options}} for label, options in trials.items()],
            }
        )
    )
    if len(board.skipped) == len(trials):
        raise UnsuitedError(board.skipped[0].reason)
    table = normalized_means(board.cells)
    scored = [label for label in trials if label in table]  # not those whose model overflows
    if math.isnan(table[scored[0]]):
        raise UnsuitedError(f"no expert scores above 0 on the held-out training rows, {rows}")
    normalized = [table[label] if label in scored else None for label in trials]
    best = points[list(trials).index(max(scored, key=table.__getitem__))]
    counts = {cell.task: cell.n for cell in board.cells if cell.method == "experts"}
    notes = {
        "chosen": best,
        "grid": {name: list(options) for name, options in entry.method.tune.items()},
        "normalized": normalized,
        "rows": counts,
        "chosen_on": "held-out training rows, which the experts may have been trained on",
    }
    return _settled(entry, notes)


def hold_out(tasks: Sequence[TaskRows], workspace: Path, limit: int, seed: int) -> Path:
    """Return a directory of {task}/{train,validation}.jsonl made of the tasks' training rows, drawn by the seed.

    validation.jsonl has at most `limit` rows and at most half of them. train.jsonl has the rest. Prompts take their
    few-shot examples from train.jsonl, or from the task's dev.jsonl, which is copied.
    """
    files = {rows.task.name: rows.file("train") for rows in tasks}
    for file in files.values():
        if not file.is_file():
            raise UnsuitedError(f"{file}: no such file; options are chosen on held-out training rows")
    sources = [*files.values(), *(file.with_name("dev.jsonl") for file in files.values())]
    decisive = [f"{file.parent.name}/{file.name}:{digest_files(file)}" for file in sources if file.is_file()]
    directory = workspace / f"rows-{digest([decisive, limit, seed])[:16]}"
    for own in tasks:
        task, file = own.task.name, files[own.task.name]
        rows = shuffled(own.read("train"), seed)
        count = min(limit, len(rows) // 2)
        if not count:
            raise UnsuitedError(
                f"{file}: only one row; options are chosen on held-out training rows, and one must stay"
            )
        for split, part in (("validation", rows[-count:]), ("train", rows[:-count])):
            write_text(split_path(directory, task, split), "".join(json.dumps(row) + "\n" for row in part))
        if (dev := file.with_name("dev.jsonl")).is_file():
            write_text(split_path(directory, task, "dev"), dev.read_text(encoding="utf-8"))
    return directory
