"""What is checked before the first cell: every row of every task, the experts' heads, and the methods' options."""

from __future__ import annotations

import contextlib
from pathlib import Path

from twin_bench.checkpoints.sources import Sources
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


def check_heads(suite: Suite, sources: Sources) -> None:
    """Raise an InputError for an expert whose head has more or fewer labels than its task."""
    output = sources.skeleton.head_output
    if output is None:
        return
    for task in suite.tasks:
        found, expected = sources.experts[task].head()[output].shape[0], TASKS[task].num_labels
        if found != expected:
            raise InputError(
                f"expert {task!r} ({suite.expert_paths[task]}): its head has {found} labels and {task} has {expected}; "
                "name an expert that was trained on this task"
            )


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
