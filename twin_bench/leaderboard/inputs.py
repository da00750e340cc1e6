"""The inputs of a suite's run: where its rows are, and digests of everything that decides a score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twin_bench.checkpoints.digests import known_digest
from twin_bench.checkpoints.hub import model_directory
from twin_bench.data.named import NamedTask
from twin_bench.data.rows import NoSplitError, TaskRows, hub_rows
from twin_bench.data.task import Task
from twin_bench.demo import experts_directory, write_data
from twin_bench.errors import InputError
from twin_bench.files import (
    digest,
    digest_file,
    digest_files,
    read_record,
    write_json_lines,
    write_record,
)
from twin_bench.leaderboard.harness import Harness
from twin_bench.leaderboard.suite import Entry, Suite
from twin_bench.leaderboard.tasks import EMBEDDED, HUB, HubRows
from twin_bench.leaderboard.training import has_router
from twin_bench.locks import made_by_one
from twin_bench.protocols import ProtocolName
from twin_bench.twin.routers.store import FORMAT as ROUTERS_FORMAT

FORMAT = 7
"""The format of what a cell's score is made of. It is raised with every change of code that changes a score."""
ROWS_FORMAT = 2
"""The format of the record of rows that were downloaded, or that a harness has written."""


def located(suite: Suite) -> Suite:
    """Return the suite with a directory in place of `experts: embedded`."""
    if suite.experts != EMBEDDED:
        return suite
    return suite.model_copy(update={"experts": str(experts_directory())})


def rows_of(
    suite: Suite, tasks: Mapping[str, Task], out: Path, harness: Harness, *, trained: bool
) -> dict[str, TaskRows]:
    """Return each task with the directory of its rows, generated or downloaded to `out` where the suite says so.

    `trained` says that the tasks' training rows are read. Raises InputError for a task without a file of rows.
    """
    found: dict[str, TaskRows] = {}
    for name, task in tasks.items():
        split, data = task.split or suite.split, suite.data_of(name)
        if isinstance(task, NamedTask):
            found[name] = TaskRows(task, out / "data" / harness.name, split)
        elif data == EMBEDDED:
            found[name] = TaskRows(task, out / "data" / EMBEDDED, split)
            if not any(rows.directory == found[name].directory for rows in [*found.values()][:-1]):
                with made_by_one(found[name].directory):
                    write_data(found[name].directory)  # of the seed that the shipped experts were trained on
        elif data == HUB or isinstance(data, HubRows):
            found[name] = TaskRows(task, out / "data" / HUB, split)
            _download(found[name], trained=trained)
        else:
            assert isinstance(data, str)
            found[name] = TaskRows(task, Path(data), split)
            file = found[name].file(split)
            if not file.is_file():
                raise InputError(f"{file}: no such file; suite {suite.name} scores {{data}}/{{task}}/{split}.jsonl")
    return found


def _download(rows: TaskRows, *, trained: bool) -> None:
    """Download the rows that the directory lacks, or holds with another checksum than they were written with.

    The training rows are downloaded where the data set has some, also if nothing reads them: a later run with a method
    that does then finds the cells of this one.
    """
    task, record = rows.task, rows.directory / "rows.json"
    known = read_record(record, format_number=ROWS_FORMAT) or {}
    for split in dict.fromkeys((*(["dev"] if task.has_dev else []), rows.split, "train")):
        file, source = rows.file(split), list(task.hub_split(split))
        if not file.is_file() or known.get(f"{task.name}/{split}") != [*source, digest_file(file)]:
            try:
                found = hub_rows(task, split)
            except NoSplitError as error:
                if split != "train" or rows.split == "train":
                    raise
                if trained or rows.examples_from_train:
                    reader = "a method is made from training rows" if trained else "few-shot examples are training rows"
                    raise InputError(
                        f"{error}; {reader}: leave it out, or give data: a directory of {{task}}/{{split}}.jsonl"
                    ) from None
                continue
            write_json_lines(file, found)
            known[f"{task.name}/{split}"] = [*source, digest_file(file)]
            write_record(record, known, format_number=ROWS_FORMAT)


def write_prompts(
    tasks: Iterable[TaskRows], harness: Harness, digests: Mapping[str, str], *, scored: bool = False
) -> None:
    """Write {task}/train.jsonl of the tasks that the harness brings, unless it was written of the same rows.

    `digests` are those of the harness's own rows, as TASK/NAME to digest. With `scored`, {task}/{split}.jsonl is
    written, which protocol paper alone may see.
    """
    for rows in tasks:
        if isinstance(rows.task, NamedTask):
            record, split = rows.directory / "rows.json", rows.split if scored else "train"
            known = read_record(record, format_number=ROWS_FORMAT) or {}
            file, name = rows.file(split), f"{rows.task.name}/{split}"
            source = [rows.task.identity, named_digests([rows], digests)]
            if not file.is_file() or known.get(name) != [source, digest_file(file)]:
                written = list(harness.prompts(rows.task, scored=scored))
                file.unlink(missing_ok=True)
                if written:
                    write_json_lines(file, written)
                    known[name] = [source, digest_file(file)]
                    write_record(record, known, format_number=ROWS_FORMAT)


def named_digests(tasks: Iterable[TaskRows], digests: Mapping[str, str]) -> dict[str, str]:
    """Return those of a harness's digests that are of tasks which it brings."""
    named = [rows.task.name for rows in tasks if isinstance(rows.task, NamedTask)]
    return {key: value for name in named for key, value in _of_task(name, digests).items()}


def input_digests(suite: Suite, tasks: Mapping[str, TaskRows]) -> dict[str, Any]:
    """Return digests of what scores depend on besides settings: weights, rows, tasks, and a router's rows."""
    # All models are downloaded before the first digest: an expert may be in a folder of the base model's repository.
    pickle = suite.allow_pickle
    base_model = model_directory(suite.base_model, tokenizer=True, allow_pickle=pickle)
    experts = {name: model_directory(path, allow_pickle=pickle) for name, path in suite.expert_paths.items()}
    found: dict[str, Any] = {
        "base_model": digest_files(base_model, known_digest),
        # A list: methods that draw, or that tell a first expert from a second, depend on the order.
        "experts": [[name, digest_files(folder, known_digest)] for name, folder in experts.items()],
        "tasks": {name: rows.task.identity for name, rows in tasks.items()},
        "rows": {},
        "training": {},
    }
    for name, rows in tasks.items():
        named = isinstance(rows.task, NamedTask)
        for split in ("train",) if named else sorted({"train", "dev", "validation", rows.split}):
            if (file := rows.file(split)).is_file():
                found["training" if named else "rows"][f"{name}/{split}"] = digest_files(file)
    if "data" in suite.router:
        data = Path(suite.router["data"])
        files = sorted(data.rglob("*.jsonl")) if data.is_dir() else [data]
        found["training"] |= {str(file.relative_to(data)): digest_files(file) for file in files if file.is_file()}
    return found


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

    A method that sees training rows or the rows that are scored sees those of all tasks, and whose they are. Any other
    method sees a task's own rows alone: a prompt takes its few-shot examples from them. The number of the routers'
    format stands for how they are chosen and fitted.
    """
    seen = {key: inputs[key] for key in ("base_model", "experts")}
    own: dict[str, Any] = {"tasks": inputs["tasks"][task], "rows": _of_task(task, inputs["rows"])}
    all_rows = {key: inputs[key] for key in ("tasks", "rows", "training")}
    trained = "training rows" in entry.method.sees
    return digest(
        {
            "format": FORMAT,
            "method": entry.method.identity,
            "settings": entry.settings(suite.seed),
            "protocol": protocol,
            "task": task,
            "inputs": {**seen, **(all_rows if entry.method.sees - {"task"} else own)},
            "router": suite.router if trained else None,
            **({"routers": ROUTERS_FORMAT} if has_router(entry) and entry.track == "per-input" else {}),
            "split": suite.split,
            "seed": suite.seed,
            "max_length": suite.max_length,
            "dtype": suite.dtype,
            "rows": rows,
            "calibration_rows": suite.calibration_rows if trained else None,
            "notes": dict(entry.notes),
            "where": dict(where),
        }
    )


def _of_task(task: str, digests: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in digests.items() if name.startswith(f"{task}/")}
