"""The inputs of a suite's run: where its rows are, and digests of everything that decides a score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twin_bench import demo
from twin_bench.checkpoints.hub import model_directory
from twin_bench.data import TASKS
from twin_bench.data.rows import hub_rows, split_path
from twin_bench.errors import InputError
from twin_bench.files import digest, digest_file, digest_files, read_record, write_json_lines, write_record
from twin_bench.leaderboard.suite import EMBEDDED, HUB, Entry, Suite
from twin_bench.merging.registry import ProtocolName

FORMAT = 2
"""The format of what a cell's score is made of. It is raised with every change of code that changes a score."""
ROWS_FORMAT = 1
"""The format of the record of downloaded rows."""


def located(suite: Suite) -> Suite:
    """Return the suite with a directory in place of `experts: embedded`."""
    if suite.experts != EMBEDDED:
        return suite
    return suite.model_copy(update={"experts": str(demo.experts_directory())})


def rows_directory(suite: Suite, out: Path) -> Path:
    """Return the directory of {task}/{split}.jsonl, generated or downloaded to `out` where the suite says so.

    Raises InputError for a task without a file of rows.
    """
    if suite.data == EMBEDDED:
        directory = out / "data" / EMBEDDED
        demo.write_data(directory)  # of the seed that the shipped experts were trained on
        return directory
    if suite.data == HUB:
        directory = out / "data" / HUB
        _download(suite, directory)
        return directory
    directory = Path(suite.data)
    for task in suite.tasks:
        file = split_path(directory, task, suite.split)
        if not file.is_file():
            raise InputError(f"{file}: no such file; suite {suite.name} scores {{data}}/{{task}}/{suite.split}.jsonl")
    return directory


def _download(suite: Suite, directory: Path) -> None:
    """Download the tasks' rows that `directory` lacks, or holds with another checksum than they were written with."""
    record = directory / "rows.json"
    known = read_record(record, format_number=ROWS_FORMAT) or {}
    for task in suite.tasks:
        for split in ("train", suite.split, *(["dev"] if TASKS[task].has_dev else [])):
            file = split_path(directory, task, split)
            if not file.is_file() or known.get(f"{task}/{split}") != digest_file(file):
                write_json_lines(file, hub_rows(TASKS[task], split))
                known[f"{task}/{split}"] = digest_file(file)
                write_record(record, known, format_number=ROWS_FORMAT)


def input_digests(suite: Suite, data: Path) -> dict[str, Any]:
    """Return digests of what scores depend on besides settings: weights and rows."""
    files = [
        split_path(data, task, split)
        for task in suite.tasks
        for split in sorted({"train", "dev", "validation", suite.split})
    ]
    return {
        "base_model": digest_files(model_directory(suite.base_model)),
        # A list: methods that draw, or that tell a first expert from a second, depend on the order.
        "experts": [[task, digest_files(model_directory(path))] for task, path in suite.expert_paths.items()],
        "rows": {f"{file.parent.name}/{file.stem}": digest_files(file) for file in files if file.is_file()},
    }


def cell_key(
    suite: Suite,
    entry: Entry,
    protocol: ProtocolName,
    task: str,
    inputs: dict[str, Any],
    *,
    rows: int | None,
    where: Mapping[str, str],
) -> str:
    """Return the digest of everything that decides a cell's score. `where` names the harness and the kind of device.

    A method that sees training rows or the rows that are scored sees those of all tasks. Any other method sees a
    task's own rows alone: a prompt takes its few-shot examples from them.
    """
    own = {name: value for name, value in inputs["rows"].items() if name.startswith(f"{task}/")}
    return digest(
        {
            "format": FORMAT,
            "method": entry.method.identity,
            "settings": entry.settings(suite.seed),
            "protocol": protocol,
            "task": task,
            "inputs": {**inputs, "rows": inputs["rows"] if entry.method.sees - {"task"} else own},
            "split": suite.split,
            "seed": suite.seed,
            "max_length": suite.max_length,
            "dtype": suite.dtype,
            "rows": rows,
            "calibration_rows": suite.calibration_rows if "training rows" in entry.method.sees else None,
            "notes": dict(entry.notes),
            "where": dict(where),
        }
    )
