"""What is checked before the first cell: every row of every task, and the methods' options."""

from __future__ import annotations

import logging
from pathlib import Path

from twin_bench.contenders import Context, rehearse
from twin_bench.data import TASKS
from twin_bench.data.rows import read_rows, split_path
from twin_bench.errors import InputError, NotFiniteError, UnsuitedError, first_line
from twin_bench.leaderboard.suite import Entry, Suite

_log = logging.getLogger(__name__)


def check_rows(suite: Suite, data: Path) -> None:
    """Raise an InputError that names file and line for a row that its task cannot use."""
    for task in suite.tasks:
        for split in dict.fromkeys((suite.split, "train", "dev")):
            file = split_path(data, task, split)
            if split == suite.split or file.is_file():
                read_rows(file, TASKS[task])


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
