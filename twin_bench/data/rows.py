"""Rows of the tasks, from JSON lines on disk or from the hub, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from twin_bench.data.generative import shuffled
from twin_bench.data.named import NamedTask
from twin_bench.data.registry import TASKS
from twin_bench.data.task import Row, Task, TaskInput, text_field
from twin_bench.errors import InputError, first_line, nearest, shown


def split_path(data: Path, task: str, split: str = "validation") -> Path:
    """Return `data`/`task`/`split`.jsonl, the file of a task's rows.

    Raises InputError if the split is not a plain name.
    """
    if not split.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"split {split!r}: expected the name of a split, such as validation")
    return data / task / f"{split}.jsonl"


def read_rows(path: Path, task: Task) -> list[Row]:
    """Read the labelled rows of one task.

    The file holds JSON lines in the schema of the task's data set on the hub (GLUE's, or see
    `twin_bench.data.generative`). Blank lines are skipped. Other fields are kept.

    Raises:
        InputError: names the file and the line. The file is missing, empty or malformed, a field is missing or not
            text, or a label is not one of the task's.
    """
    rows = []
    for where, row in read_json_lines(path):
        task.check(row, where)
        rows.append(row)
    return rows


class NoSplitError(InputError):
    """The data set on the hub has no split of the name that was asked for."""


def hub_rows(task: Task, split: str) -> list[Row]:
    """Read a task's rows from the hub. If it can't be reached, an InputError names the remedy.

    Raises NoSplitError, an InputError, if the data set has no such split.
    """
    import datasets

    source = task.hub_split(split)
    try:
        rows = list(datasets.load_dataset(source.dataset, source.configuration, split=source.split))
    except Exception as error:  # datasets and the hub's client raise many kinds: offline, refused, cut, no such split
        if str(error).startswith("Unknown split"):
            raise NoSplitError(
                f"{task.name}: the hub's {source.dataset}: {first_line(error)}; name another split"
            ) from error
        raise InputError(
            f"{task.name}: the hub's {source.dataset} cannot be read ({first_line(error)}); run again, log in if it is "
            "private or gated (`hf auth login`, or set HF_TOKEN), or give a directory of TASK/SPLIT.jsonl "
            "(TWIN_BENCH_DATA, or data in a suite)"
        ) from error
    kept = task.of_hub_split(rows, split)
    for number, row in enumerate(kept):
        task.check(row, f"{source.dataset} {source.configuration}, row {number}")
    return kept


def task_rows(task: Task, split: str, directory: Path | None) -> list[Row]:
    """Read a task's rows from `directory`/TASK/SPLIT.jsonl, or from the hub if no directory is given."""
    return read_rows(split_path(directory, task.name, split), task) if directory else hub_rows(task, split)


def few_shot_pool(task: Task, directory: Path | None, shots: int | None = None) -> list[Row]:
    """Return the rows that few-shot examples are taken from: the split dev in its order, or else train shuffled.

    dev is dev.jsonl, or the hub's split where the data set has one. lm-eval's own MMLU takes its first rows as well.
    The list is empty if `shots` (by default the task's own number) is 0.
    """
    if not (task.shots if shots is None else shots):
        return []
    if split_path(directory, task.name, "dev").is_file() if directory else task.has_dev:
        return task_rows(task, "dev", directory)
    return shuffled(task_rows(task, "train", directory))


@dataclass(frozen=True)
class TaskRows:
    """A task and the directory of its rows: DIRECTORY/TASK/SPLIT.jsonl. `split` is the one that is scored."""

    task: Task
    directory: Path
    split: str

    def file(self, split: str) -> Path:
        """Return the file of a split."""
        return split_path(self.directory, self.task.name, split)

    def read(self, split: str) -> list[Row]:
        """Read a split's rows (see `read_rows`)."""
        return read_rows(self.file(split), self.task)

    def pool(self) -> list[Row]:
        """Return the rows that few-shot examples are taken from."""
        return few_shot_pool(self.task, self.directory)

    @property
    def examples_from_train(self) -> bool:
        """Whether few-shot examples are taken from the training rows: the task has some, and no rows of split dev."""
        return bool(self.task.shots) and not self.file("dev").is_file()

    def scored_inputs(self, limit: int | None) -> list[TaskInput]:
        """Return a model's inputs for the first `limit` rows that are scored (None: all), in the order of scoring."""
        return self.task.inputs(self.task.scoring_order(self.read(self.split))[:limit], self.pool())

    def training_answers(self) -> list[Any]:
        """Return the expected answers of the training rows; none if the task's answers are free texts."""
        return [answer for answer in map(self.task.expected, self.read("train")) if answer is not None]

    def training_inputs(self) -> Iterator[TaskInput]:
        """Yield the training rows as a router's inputs. Labels are not read."""
        yield from self.task.training_inputs(read_json_lines(self.file("train")), self.pool())


class RouterRows(NamedTuple):
    """The rows that routers are trained on, and the tasks on whose test rows the authors' code selects its router.

    `labelled` are the tasks whose own training rows they are, where these have labels.
    """

    train: Sequence[TaskInput]
    tested: Sequence[TaskRows] = ()
    labelled: Sequence[TaskRows] = ()

    def answers(self) -> dict[TaskInput, list[Any]]:
        """Return the expected answers of training rows that have one: all of them where several rows have one text."""
        found: dict[TaskInput, list[Any]] = {}
        for rows in self.labelled:
            read = rows.read("train")
            for row, answer in zip(rows.task.inputs(read, rows.pool()), map(rows.task.expected, read), strict=True):
                if answer is not None:
                    found.setdefault(row, []).append(answer)
        return found

    def of(self, experts: Collection[str]) -> RouterRows:
        """Return the rows of some experts."""
        train = [row for row in self.train if row.task in experts]
        tested, labelled = (
            [rows for rows in tasks if rows.task.expert in experts] for tasks in (self.tested, self.labelled)
        )
        return RouterRows(train, tested, labelled)

    def test(self, limit: int) -> list[TaskInput]:
        """Return the first `limit` test rows of each task."""
        return [row for rows in self.tested for row in rows.scored_inputs(limit)]


def router_rows(tasks: Iterable[TaskRows], expert_names: Sequence[str]) -> RouterRows:
    """Return the rows of tasks as a router's: an expert's rows are those of all its tasks.

    Args:
        tasks: the tasks. Those that are nobody's, and splits without a file, are passed over.
        expert_names: the experts, in whose order the rows are.

    Raises:
        InputError: an expert without training rows, or a malformed row.
    """
    tasks = list(tasks)
    owned = [rows for name in expert_names for rows in tasks if rows.task.expert == name]
    train = [row for rows in owned if rows.file("train").is_file() for row in rows.training_inputs()]
    trained = {row.task for row in train}
    for name in expert_names:
        if name not in trained:
            own = [rows for rows in owned if rows.task.expert == name]
            named = ", ".join(rows.task.name for rows in own if isinstance(rows.task, NamedTask))
            files = ", ".join(str(rows.file("train")) for rows in own)
            why = f"no {files}; add it" if files else "no task is its"
            if named:
                why = f"{named} has no rows but those that are scored, or scores whole texts; give it another task"
            raise InputError(
                f"no router rows for expert {name!r}: {why}"
                ', or give router: {data: FILE} with rows {"text": ..., "task": EXPERT}'
            )
    tested = owned if all(rows.file(rows.split).is_file() for rows in owned) else ()
    return RouterRows(train, tested, [rows for rows in owned if rows.file("train").is_file()])


def read_router_rows(path: Path, expert_names: Sequence[str]) -> RouterRows:
    """Read the rows of a router. Labels are not read.

    Args:
        path: a directory of {expert}/train.jsonl. Of an expert that is named after a known task, the rows are in that
            task's own schema; of any other, they are {"text": ...} with an optional "text_pair". Or a file, or a
            directory of .jsonl files, with rows {"text": ..., "task": ...} and an optional "text_pair".
        expert_names: the experts. Each of them needs rows. If all are named after known tasks whose validation.jsonl
            is in the directory, these are the test rows.

    Raises:
        InputError: nothing is at `path`, an expert has no rows, or a row is malformed or of an unknown task.
    """
    if not path.exists():
        raise InputError(
            f'{path}: no such file; router.data is a file of rows {{"text": ..., "task": EXPERT}}, or a folder of '
            "EXPERT/train.jsonl"
        )
    known = {name: TaskRows(TASKS[name], path, "validation") for name in expert_names if name in TASKS}
    train_files = {name: split_path(path, name, "train") for name in expert_names}
    if any(file.is_file() for file in train_files.values()):
        train = [
            row
            for name, file in train_files.items()
            if file.is_file()
            for row in (known[name].training_inputs() if name in known else _texts_of(name, file))
        ]
    else:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise InputError(
                f"{path}: no router rows; put {{task}}/train.jsonl in the data set's own schema there, "
                'or .jsonl files of {"text": ..., "task": ...} rows'
            )
        train = [_router_row(row, expert_names, where) for file in files for where, row in read_json_lines(file)]
    missing = [name for name in expert_names if name not in {row.task for row in train}]
    if missing:
        raise InputError(f"{path}: no router rows for {', '.join(missing)}; every expert needs some")
    tested = len(known) == len(expert_names) and all(rows.file(rows.split).is_file() for rows in known.values())
    labelled = [rows for name, rows in known.items() if train_files[name].is_file()]
    return RouterRows(train, list(known.values()) if tested else (), labelled)


def _texts_of(expert: str, file: Path) -> Iterator[TaskInput]:
    """Yield an expert's training rows that are texts."""
    for where, row in read_json_lines(file):
        if row.get("task", expert) != expert:
            raise InputError(f"{where}: task {shown(row['task'])} in the rows of expert {expert!r}; move or remove it")
        yield _router_row({**row, "task": expert}, [expert], where)


def _router_row(row: Row, expert_names: Sequence[str], where: str) -> TaskInput:
    task = text_field(row, "task", where)
    if task not in expert_names:
        raise InputError(f"{where}: no expert is named {shown(task)}{nearest(task, expert_names)}")
    pair = text_field(row, "text_pair", where) if row.get("text_pair") is not None else None
    return TaskInput(text_field(row, "text", where), pair, task)


def read_json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield ("file, line n", row) for every line that is not blank."""
    try:
        # Not splitlines: it would also cut at U+2028, which JSON allows inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; rows are read from DATA/TASK/SPLIT.jsonl") from None
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {number}: cannot be read as UTF-8 text ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not any(line.strip() for line in lines):
        raise InputError(f"{path}: empty; expected one JSON object a line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_with_each_field_once)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        except RecursionError:
            raise InputError(f"{where}: nested too deeply; make it flatter") from None
        except ValueError as error:  # not JSON, or an integer of thousands of digits
            raise InputError(f"{where}: not JSON ({error})") from None
        if "\\ud" in line.lower() and not _is_text(json.dumps(row, ensure_ascii=False)):
            raise InputError(f"{where}: an escape \\ud... that is half of a character; write the whole character")
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, found {shown(line.strip())}")
        yield where, row


def _is_text(text: str) -> bool:
    """Return whether UTF-8 can express a text, as tokenizers ask for. Half of a surrogate pair has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _with_each_field_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's fields. InputError if a field stands twice, of which json would take the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the field {shown(twice)} stands twice; remove one")
    return row
