"""What entries are trained on, and which of the rows that are scored are among it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twin_bench.contenders import Context
from twin_bench.contenders.twins import check_router_rows, rows_for_routers
from twin_bench.data.named import NamedTask
from twin_bench.data.rows import TaskRows
from twin_bench.errors import InputError, UnsuitedError
from twin_bench.leaderboard.suite import Entry, Suite
from twin_bench.merging.registry import ServedMethod

Working = tuple[Entry, Context]
"""An entry and what its method is given under one protocol."""
Texts = set[tuple[str, str | None]]
"""Texts, or pairs of texts."""


def is_trained(entry: Entry) -> bool:
    """Return whether an entry's model is made from training rows."""
    return "training rows" in entry.method.sees


def has_router(entry: Entry) -> bool:
    """Return whether a router is trained for an entry. A twin that is told each row's task is built with one too."""
    served = isinstance(entry.method, ServedMethod) and is_trained(entry)
    return served and entry.track in ("per-input", "task-id given")


def reads_own_rows(entry: Entry, suite: Suite) -> bool:
    """Return whether an entry needs the tasks' own training rows: to be made from them, or to be tuned on them."""
    return entry.to_tune or (is_trained(entry) and not (has_router(entry) and "data" in suite.router))


def check_routers(working: Sequence[Working]) -> None:
    """Raise an InputError if an expert has too few rows for an entry's router, or a malformed one."""
    routed = [(entry.label, context) for entry, context in working if has_router(entry)]
    if not routed:
        return
    rows = rows_for_routers(routed[0][1])
    for label, context in routed:
        try:
            check_router_rows(context, rows)
        except UnsuitedError:  # skipped later, with its reason
            continue
        except InputError as error:
            raise InputError(f"{label}: {error}") from None


def check_training(working: Sequence[Working]) -> None:
    """Raise an InputError if an entry is trained on all rows of a task that are scored.

    The protocol paper sees scored rows by its nature, and is left out.
    """
    strict = [(entry, context) for entry, context in working if context.protocol != "paper" and is_trained(entry)]
    for entry, context in strict:
        for rows in context.tasks:
            if rows.split == "train" and not isinstance(rows.task, NamedTask):
                raise InputError(
                    f"task {rows.task.name}: split train is scored, and {entry.label} is made from it; score another "
                    f"split, or leave {entry.label} out"
                )
    for rows, count, total, labels in _shared(strict):
        if count == total:
            raise InputError(
                f"{rows.file(rows.split)}: all {total} rows are among the rows that {labels[0]} is made from; score "
                f"rows of their own, or leave {labels[0]} out"
            )


def shared_rows(working: Sequence[Working]) -> list[str]:
    """Return a sentence for each task of which some scored rows are among the rows that entries are trained on."""
    return [
        f"{count} of {total} rows of {rows.task.name}'s split {rows.split} are among the training rows of "
        f"{', '.join(labels)}."
        for rows, count, total, labels in _shared(working)
    ]


def _shared(working: Sequence[Working]) -> Iterable[tuple[TaskRows, int, int, list[str]]]:
    """Yield a task, how many of its scored rows are trained on, how many there are, and the entries' labels.

    The entries are of one run. Rows are equal if their texts are, with few-shot examples or without.
    """
    of_router: dict[bool, list[Working]] = {}
    for entry, context in working:
        if is_trained(entry):
            of_router.setdefault(has_router(entry) and "data" in context.router, []).append((entry, context))
    for router, own in of_router.items():
        context = own[0][1]
        seen = _texts_of_router(context) if router else _texts_of_tasks(context)
        labels = list(dict.fromkeys(entry.label for entry, _ in own))
        for rows in context.tasks:
            if rows.file(rows.split).is_file():
                scored, pool = rows.read(rows.split), rows.pool()
                asked = ([*rows.task.inputs([row], pool), *rows.task.inputs([row], ())] for row in scored)
                count = sum(any((one.text, one.text_pair) in seen for one in forms) for forms in asked)
                if count:
                    yield rows, count, len(scored), labels


def _texts_of_router(context: Context) -> Texts:
    return {(row.text, row.text_pair) for row in rows_for_routers(context).train}


def _texts_of_tasks(context: Context) -> Texts:
    owned = [rows for rows in context.tasks if rows.task.expert is not None and rows.file("train").is_file()]
    return {(row.text, row.text_pair) for rows in owned for row in rows.training_inputs()}
