"""Rows of the tasks, from JSON lines on disk, read with errors that name the file and the line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twin_bench.checkpoint import TaskType
from twin_bench.errors import InputError, nearest
from twin_bench.generative import GENERATIVE, GenerativeTask, shuffled
from twin_bench.glue import GLUE, GlueTask

Row = dict[str, Any]
Task = GlueTask | GenerativeTask
TASKS: dict[str, Task] = {**GLUE, **GENERATIVE}
"""All that a suite can score."""


def task_type_of(name: str) -> TaskType:
    """Return the kind of model that answers a task."""
    return "sequence_classification" if name in GLUE else "causal_lm"


class TaskInput(NamedTuple):
    """A text, or a pair of texts, and the task (the expert) it belongs to."""

    text: str
    text_pair: str | None
    task: str


def split_path(data: Path, task: str, split: str = "validation") -> Path:
    """Return `data`/`task`/`split`.jsonl, a task's rows; InputError for a split that is no plain name."""
    if not split.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"split {split!r}: expected the name of a split, such as validation")
    return data / task / f"{split}.jsonl"


def read_rows(path: Path, task: Task) -> list[Row]:
    """Read the labelled rows of one task.

    The file holds JSON lines in the schema that the task's data set has on the hub (GLUE's, or see
    `twin_bench.generative`); blank lines are passed over, other fields kept. Raises InputError, naming file and
    line, for a missing, empty or malformed file, a missing or non-text field, or a label that is not one of the
    task's.
    """
    return [check_row(row, task, where) for where, row in _read_json_lines(path)]


def check_row(row: Row, task: Task, where: str) -> Row:
    """Return `row` if it holds the task's texts and one of its labels; else InputError, led by `where`."""
    if isinstance(task, GenerativeTask):
        task.check(row, where)
        return row
    text_pair(row, task, where)
    label = row.get("label")
    if task.is_regression:
        if not isinstance(label, int | float) or isinstance(label, bool) or not math.isfinite(label):
            raise InputError(f"{where}: label {label!r}; {task.name} needs a number")
    elif type(label) is not int or not 0 <= label < task.num_labels:
        known = ", ".join(f"{i} {name}" for i, name in enumerate(task.label_names))
        raise InputError(f"{where}: label {label!r}; {task.name} needs one of: {known}")
    return row


def hub_rows(task: Task, split: str) -> list[Row]:
    """Read a task's rows from the hub; InputError with the way round where it can't be reached.

    GLUE comes from nyu-mll/glue. A generative task's `train` is the split of its examples; where its data set
    has none, a tenth of the rows, drawn by a seed, is `train` and the rest `validation`.
    """
    import datasets

    if isinstance(task, GenerativeTask):
        if split not in ("train", "validation"):
            raise InputError(
                f"{task.name}: split {split!r}; of the hub's rows validation is scored, and train has examples"
            )
        source, configuration, scored, solved = task.hub
        hub_split = scored if split == "validation" else (solved or scored)
    else:
        source, configuration, hub_split = "nyu-mll/glue", task.name, task.hub_split(split)
    try:
        rows = list(datasets.load_dataset(source, configuration, split=hub_split))
    except (OSError, ValueError) as error:  # offline, unreachable, no such split
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{task.name}: the hub's {source} cannot be read ({reason}); "
            "set TWIN_BENCH_DATA to a directory of TASK/SPLIT.jsonl"
        ) from error
    if isinstance(task, GenerativeTask) and task.hub[3] is None:
        rows = [dict(row) for row in shuffled(rows)]
        aside = len(rows) // 10
        rows = rows[:aside] if split == "train" else rows[aside:]
    return [check_row(row, task, f"{source} {configuration}, row {number}") for number, row in enumerate(rows)]


def task_rows(task: Task, split: str, directory: Path | None) -> list[Row]:
    """Read a task's rows from `directory`/TASK/SPLIT.jsonl, or from the hub where no directory is named."""
    return read_rows(split_path(directory, task.name, split), task) if directory else hub_rows(task, split)


def solved_examples(task: GenerativeTask, directory: Path | None) -> list[Row]:
    """Return the rows that solved examples are drawn from, in their order: dev.jsonl, else train, shuffled."""
    if directory and split_path(directory, task.name, "dev").is_file():
        return read_rows(split_path(directory, task.name, "dev"), task)
    return [dict(row) for row in shuffled(task_rows(task, "train", directory))]


def text_pair(row: Row, task: GlueTask, where: str = "row") -> tuple[str, str | None]:
    """Return a row's text and its second text (None for single sentences); `where` begins the InputError."""
    texts = [_text(row, field, where) for field in task.fields]
    return texts[0], (texts[1] if len(texts) == 2 else None)


def joined(text: str, text_pair: str | None) -> str:
    """Return a row's texts as one string, the second on a line of its own: a harness's context."""
    return text if text_pair is None else f"{text}\n{text_pair}"


def read_router_rows(path: Path, expert_names: Sequence[str]) -> list[TaskInput]:
    """Read the training inputs of a router.

    `path` is a directory of {task}/train.jsonl in the tasks' own schemas, of which those named in `expert_names`
    are read, a generative task's as prompts: every other one with its solved examples before it, as it is scored,
    the rest without. Or it is a file, or a directory of .jsonl files, with rows {"text": ..., "task": ...} and an
    optional "text_pair". Labels are not read. Raises InputError for an expert without rows, a row of an unknown task,
    and whatever is malformed.
    """
    train_files = {name: split_path(path, name, "train") for name in expert_names if name in TASKS}
    if any(file.is_file() for file in train_files.values()):
        rows = [
            row
            for name, file in train_files.items()
            if file.is_file()
            for row in _training_inputs(TASKS[name], path, file)
        ]
    else:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise InputError(
                f"{path}: no router rows; put {{task}}/train.jsonl in the data set's own schema there, "
                'or .jsonl files of {"text": ..., "task": ...} rows'
            )
        rows = [_router_row(row, expert_names, where) for file in files for where, row in _read_json_lines(file)]
    missing = [name for name in expert_names if name not in {row.task for row in rows}]
    if missing:
        raise InputError(f"{path}: no router rows for {', '.join(missing)}; every expert needs some")
    return rows


def scored_inputs(task: Task, directory: Path, file: Path, limit: int | None) -> list[TaskInput]:
    """Return the first `limit` rows (None: all) as they are scored, a generative task's in their drawn order."""
    rows = read_rows(file, task)
    if isinstance(task, GenerativeTask):
        solved = solved_examples(task, directory) if task.shots else []
        drawn = shuffled(rows)[:limit]
        return [TaskInput(task.prompt(row, task.examples(row, solved)), None, task.name) for row in drawn]
    return [TaskInput(*text_pair(row, task), task.name) for row in rows[:limit]]


def _training_inputs(task: Task, directory: Path, file: Path) -> Iterator[TaskInput]:
    if isinstance(task, GenerativeTask):
        solved = solved_examples(task, directory)
        for index, row in enumerate(read_rows(file, task)):
            examples = task.examples(row, solved) if index % 2 else []
            yield TaskInput(task.prompt(row, examples), None, task.name)
    else:
        for where, row in _read_json_lines(file):
            yield TaskInput(*text_pair(row, task, where), task.name)


def _router_row(row: Row, expert_names: Sequence[str], where: str) -> TaskInput:
    task = _text(row, "task", where)
    if task not in expert_names:
        raise InputError(f"{where}: no expert is named {task!r}{nearest(task, expert_names)}")
    pair = _text(row, "text_pair", where) if row.get("text_pair") is not None else None
    return TaskInput(_text(row, "text", where), pair, task)


def _text(row: Row, field: str, where: str) -> str:
    if field not in row:
        raise InputError(f"{where}: no field {field!r}{nearest(field, row)}")
    if not isinstance(row[field], str):
        raise InputError(f"{where}: field {field!r} is not a text but {row[field]!r}")
    return str(row[field])


def _read_json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield ("file, line n", row) for every line that is not blank."""
    try:
        # Not splitlines: it would also cut at U+2028, which JSON allows inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; rows are read from DATA/TASK/SPLIT.jsonl") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not any(line.strip() for line in lines):
        raise InputError(f"{path}: empty; expected one JSON object a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, found {line.strip()[:40]!r}")
        yield where, row
