"""What is checked before the first cell: every row of every task, and the methods' options."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from twin_bench.contenders import Context, rehearse
from twin_bench.data.named import NamedTask
from twin_bench.data.registry import TASKS
from twin_bench.data.rows import TaskRows
from twin_bench.data.task import CLASSIFIERS, TaskType
from twin_bench.errors import InputError, NotFiniteError, UnsuitedError, first_line, nearest
from twin_bench.leaderboard.suite import Entry, Suite

_log = logging.getLogger(__name__)


def check_names(tasks: Iterable[str]) -> None:
    """Raise an InputError for two tasks whose names differ in case alone: some file systems ignore case."""
    first: dict[str, str] = {}
    for name in tasks:
        if (other := first.setdefault(name.lower(), name)) != name:
            raise InputError(f"two tasks are named {other!r} and {name!r}, which differ in case alone; rename one")


def check_rows(tasks: Iterable[TaskRows], *, trained: bool) -> None:
    """Raise an InputError that names file and line for a row that its task cannot use.

    An empty train.jsonl is passed over where nothing reads it. `trained` says that training rows are read.
    """
    for rows in tasks:
        for split in dict.fromkeys((rows.split, "train", "dev")):
            file = rows.file(split)
            unread = split == "train" != rows.split and not (trained or rows.examples_from_train)
            if file.is_file() and not (unread and not file.read_bytes().strip()):
                rows.read(split)


def check_kind(suite: Suite, task_type: TaskType) -> None:
    """Raise an InputError unless models of the experts' kind can answer all tasks of a suite."""
    for name, task in suite.kinds.items():
        if task_type in task.suits:
            continue
        if task_type in CLASSIFIERS and isinstance(task, NamedTask):
            hint = (
                "no data; give data: a directory of {task}/{split}.jsonl, or hub"
                if name in TASKS and suite.data_of(name) is None
                else f"unknown task {name!r}{nearest(name, TASKS)}; the experts are classifiers: a task of your own "
                "needs text: the field of a row that it reads"
            )
            raise InputError(f"suite {suite.name}: {hint}")
        raise InputError(f"suite {suite.name}: {name} needs {' or '.join(task.suits)} experts, these are {task_type}")


def check_options(entry: Entry, context: Context) -> None:
    """Raise an InputError for an option that is out of its range.

    A method that does not suit the experts is skipped later. One that fails in another way, such as a method of a
    user's own that looks for names of its model, can't be rehearsed.
    """
    try:
        rehearse(entry.method, context)
    except (UnsuitedError, NotFiniteError):
        return
    except InputError as error:
        named = str(error).startswith((f"{entry.label}:", f"{entry.label} "))
        raise InputError(str(error) if named else f"{entry.label}: {error}") from None
    except Exception as error:
        _log.info("%s can't be rehearsed: %s", entry.label, first_line(error))
