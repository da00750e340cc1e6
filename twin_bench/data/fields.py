"""Guesses of what the fields of a user's rows hold: the texts, the label, and the labels that occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twin_bench.data.task import Row

LABELS = ("label", "labels", "target", "class", "category", "gold", "score", "rating", "stars", "y")
"""The usual names of the field that holds the label."""
TEXTS = ("text", "prompt", "question", "instruction", "sentence", "input", "comment", "review", "context", "article")
"""The usual names of the field that holds a text."""
IDS = ("id", "idx", "index", "uid", "guid")
MOST_LABELS = 50
"""More different whole numbers than this are taken for a number to be predicted."""


@dataclass(frozen=True)
class Fields:
    """What the fields of rows hold.

    `text_pair` and `label` are None where no field looks like it. `values` are the labels that occur, sorted, and empty
    if the label is a number to be predicted. `others` are fields that look like texts too.
    """

    text: str
    text_pair: str | None
    label: str | None
    values: tuple[str | int, ...]
    others: tuple[str, ...] = ()


def guessed_fields(rows: Sequence[Row]) -> Fields | None:
    """Return what the fields of the first row hold, judged by all rows; None if none of them holds a text.

    Of three or more texts the one with a usual name is taken, or else the longest.
    """
    label = _label(rows)
    texts = [name for name in rows[0] if name != label and not _is_id(name) and _of_kind(rows, name, str)]
    texts = [name for name in texts if not _repeats(rows, name)] or texts
    if not texts:
        return None
    first, pair, others = texts[0], None, tuple[str, ...]()
    if len(texts) == 2:
        pair = texts[1]
    elif len(texts) > 2:
        usual = (name for name in TEXTS if name in texts)
        first = next(usual, None) or max(texts, key=lambda name: sum(len(str(row[name])) for row in rows))
        others = tuple(name for name in texts if name != first)
    return Fields(first, pair, label, () if label is None else _values(rows, label), others)


def _label(rows: Sequence[Row]) -> str | None:
    plain = [name for name in rows[0] if _of_kind(rows, name, str, int, float) and not _is_id(name)]
    usual = [name for known in LABELS for name in plain if name.lower() == known]
    alike = [name for name in plain if name.lower().startswith(("is_", "has_")) or name.lower().endswith("_label")]
    numbers = [name for name in plain if _of_kind(rows, name, int, float)]
    repeated = [name for name in plain if _repeats(rows, name)]
    return next((name for names in (usual, alike, numbers, repeated) for name in names), None)


def _values(rows: Sequence[Row], label: str) -> tuple[str | int, ...]:
    values = {row[label] for row in rows}
    if any(isinstance(value, float) for value in values):
        return ()
    if all(isinstance(value, int) for value in values):
        return tuple(sorted(values)) if len(values) <= MOST_LABELS else ()
    return tuple(sorted(values, key=str))


def _is_id(name: str) -> bool:
    return name.lower() in IDS or name.lower().endswith(("_id", "_idx"))


def _of_kind(rows: Sequence[Row], name: str, *kinds: type) -> bool:
    """Return whether every row has a value of one of the kinds. True and false are no whole numbers."""
    return all(type(row.get(name)) in kinds for row in rows)


def _repeats(rows: Sequence[Row], name: str) -> bool:
    """Return whether a field has few values for the number of rows, as labels have."""
    return 4 * len({row[name] for row in rows}) <= len(rows)
