"""The board of a directory: all finished cells of a suite with these inputs, whichever run has computed them."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from twin_bench.contenders.references import ReferenceMethod
from twin_bench.data.classification import Classification
from twin_bench.data.named import NamedTask
from twin_bench.data.task import Task
from twin_bench.leaderboard.prepared import Run
from twin_bench.leaderboard.suite import Entry, Suite, entry_of
from twin_bench.leaderboard.tasks import EMBEDDED, HubRows
from twin_bench.leaderboard.training import Working, shared_rows
from twin_bench.leaderboard.tune import chosen, to_tune
from twin_bench.merging.registry import methods
from twin_bench.protocols import ProtocolName
from twin_bench.results.cells import Board, Cell, Skipped, harnesses_in, installed_versions, left_out

Line = tuple[ProtocolName, str]
"""A line of the table: a protocol and a label."""


ONE_EXPERT = "one_expert"
MATRIX_PROTOCOL: ProtocolName = "standard"
"""The protocol under which every expert answers every task."""


def board_of(
    run: Run, asked: Sequence[Entry], cells: Mapping[Line, Sequence[Cell]], skipped: Sequence[Skipped]
) -> Board:
    """Return the cells of this run and of earlier ones on the same inputs, and what is left out."""
    suite, lines, missing, order = run.suite, dict[Line, Sequence[Cell]](), list[str](), list(run.tasks)
    passed_over = {(method.protocol, method.method) for method in skipped}
    idle = [entry.label for entry in asked if not any(map(entry.runs_under, suite.protocol))]
    listed, own_labels = listed_entries(suite, asked, run.cells.labels()), {entry.label for entry in suite.entries()}
    for protocol in suite.protocol:
        for entry in listed:
            line = protocol, entry.label
            if not entry.runs_under(protocol) or line in passed_over:
                continue
            found = cells.get(line) or finished(run, entry, protocol)
            if found:
                lines[line] = sorted(found, key=lambda cell: order.index(cell.task))
            elif entry.label in own_labels and not isinstance(entry.method, ReferenceMethod):
                missing.append(f"{entry.label} ({protocol})")
    matrix = [cell for entry in matrix_entries(suite) for cell in finished(run, entry, MATRIX_PROTOCOL)]
    others = run.cells.others([*(cell for own in lines.values() for cell in own), *matrix])
    shown = [dataclasses.replace(cell, protocol=protocol) for (protocol, _), own in lines.items() for cell in own]
    labels = {label for _, label in lines}
    found_entries = [entry for entry in listed if entry.label in labels]
    shared = [] if run.harness.scores_own_rows else shared_rows(working(run, found_entries))
    said = [*left_out(missing, idle, others), *shared, *_not_said(run)]
    headers = {entry.label: _header(entry, suite.seed) for entry in found_entries}
    return Board(shown, skipped, said, identity_of(run), headers, matrix)


def _not_said(run: Run) -> list[str]:
    """Return what a reader would not guess: clusters that are not drawn, and cells of other harnesses."""
    said, harness = [], run.harness
    clustered = [name for name, rows in run.tasks.items() if getattr(rows.task, "cluster", None) is not None]
    if clustered and not harness.knows_clusters:
        said.append(
            f"The rows of {harness.name} do not say their sources: rows are drawn alone on {', '.join(clustered)}."
        )
    others = sorted(set(harnesses_in(run.out)) - {harness.name})
    if others:
        said.append(
            f"The directory also holds cells of {', '.join(others)}. Tables and page are those of the last run's "
            f"harness, {harness.name}."
        )
    return said


def matrix_entries(suite: Suite) -> list[Entry]:
    """Return an entry for each expert, which answers all tasks: the lines of the table of experts on tasks."""
    return [entry_of({f"{ONE_EXPERT}.{name}": {"method": ONE_EXPERT, "expert": name}}) for name in suite.expert_paths]


def working(run: Run, entries: Sequence[Entry]) -> list[Working]:
    """Return each entry with its context, under each protocol under which it is computed."""
    found: list[Working] = []
    for entry in entries:
        run_under = filter(entry.runs_under, run.suite.protocol)
        protocols = dict.fromkeys(run.computed_under(entry, protocol) for protocol in run_under)
        found += [(entry, run.context(entry, protocol)) for protocol in protocols]
    return found


def identity_of(run: Run) -> dict[str, Any]:
    """Return what was compared, on what, and with which versions, as plain data."""
    suite = run.suite
    return {
        "suite": suite.name,
        "base_model": suite.base_model,
        "experts": dict(suite.expert_paths),
        "tasks": {name: _described(suite, name, rows) for name, rows in run.tasks.items()},
        "seed": suite.seed,
        "seeds": suite.seeds,
        "protocols": list(suite.protocol),
        "harness": run.harness.name,
        "date": run.started,
        "versions": dict(installed_versions()),
        "device": run.device,
        "machine": _machine(run.device),
        "commit": _commit(),
    }


def _described(suite: Suite, name: str, rows: Any) -> dict[str, Any]:
    data, task = suite.data_of(name), rows.task
    named = isinstance(task, NamedTask)
    where = data.hub if isinstance(data, HubRows) else "the harness's own" if named or data is None else str(data)
    return {
        "expert": task.expert,
        "metric": task.metric,
        "percent": task.percent,
        "chance": _chance(task),
        "data": where,
        "directory": str(rows.directory),
        "split": None if named and task.split is None else rows.split,
        "synthetic": data == EMBEDDED,
    }


def _chance(task: Task) -> float | None:
    """Return the accuracy of random labels in points, if the task is scored by accuracy."""
    return 100 / task.num_labels if isinstance(task, Classification) and task.metric == "acc" else None


def _header(entry: Entry, seed: int) -> dict[str, Any]:
    method = entry.method
    return {
        "method": method.name,
        "title": method.title,
        "paper": method.paper,
        "track": entry.track,
        "summary": method.formula,
        "needs": list(method.needs),
        "options": entry.settings(seed),
        "bound": entry.track == "bound",
        "told_the_task": entry.told_the_task and entry.track != "bound",
        "draws": entry.draws,
    }


def _machine(device: str) -> str:
    """Return the device in words."""
    if device.startswith("cuda"):
        if not torch.cuda.is_available():  # the workers have it
            return "GPUs of other machines"
        return str(torch.cuda.get_device_name(device))
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"


def _commit() -> str | None:
    """Return the commit of the checkout that runs, with + where files have changed; None if it is installed."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        root, head, changed = (
            subprocess.run([*git, *rest], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for rest in (["rev-parse", "--show-toplevel"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    own = Path(root) / "twin_bench" / "leaderboard" / Path(__file__).name  # not a repository that holds the environment
    return f"{head}{'+' if changed else ''}" if own.is_file() else None


def listed_entries(suite: Suite, asked: Sequence[Entry], found: Sequence[str]) -> list[Entry]:
    """Return the entries that may have cells, each followed by its tuned row.

    They are the suite's, those that were asked for, and methods with their defaults whose label is among `found`.
    """
    entries = {entry.label: entry for entry in suite.entries()}
    for entry in (*asked, *(entry_of(label) for label in found if label in methods())):
        if not entry.to_tune:
            entries.setdefault(entry.label, entry)
    listed: list[Entry] = []
    for entry in entries.values():
        listed.append(entry)
        if entry.method.tune and to_tune(entry).label not in entries:
            listed.append(to_tune(entry))
    return listed


def finished(run: Run, entry: Entry, protocol: ProtocolName) -> list[Cell]:
    """Return a line's cells if all of them are finished, else none. A reference has those that it could answer."""
    protocol, found = run.computed_under(entry, protocol), list[Cell]()
    for own in run.of_each_seed(entry):
        known = chosen(entry, run.tuning, own.choice_key(entry, protocol)) if entry.to_tune else entry
        if known is None:
            return []
        for task in own.answered(known):
            cell = own.cells.read(protocol, known.label, task, own.key(known, protocol, task))
            if cell is not None:
                found.append(cell)
            elif not isinstance(entry.method, ReferenceMethod):
                return []
    return found
