"""What is checked before the first cell: every row of every task, and the methods' options."""

from __future__ import annotations

import contextlib
from pathlib import Path

from twin_bench.contenders import Context, rehearse
from twin_bench.data import TASKS
from twin_bench.data.rows import read_rows, split_path
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.leaderboard.suite import Entry, Suite


def check_rows(suite: Suite, data: Path) -> None:
    """Raise an InputError that names file and line for a row that its task cannot use."""
    for task in suite.tasks:
        for split in dict.fromkeys((suite.split, "train", "dev")):
            file = split_path(data, task, split)
            if split == suite.split or file.is_file():
                read_rows(file, TASKS[task])


def check_options(entry: Entry, context: Context) -> None:
    """Raise an InputError for an option that is out of its range. A method that suits no expert is skipped later."""
    with contextlib.suppress(UnsuitedError):
        try:
            rehearse(entry.method, context)
        except UnsuitedError:
            raise
        except InputError as error:
            named = str(error).startswith((f"{entry.label}:", f"{entry.label} "))
            raise InputError(str(error) if named else f"{entry.label}: {error}") from None
