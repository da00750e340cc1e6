"""The interface of a task: what a row of it is, what a model reads of a row, and what scores the answers."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

TaskType = Literal["sequence_classification", "causal_lm"]
"""The kind of model that answers a task."""
Row = Mapping[str, Any]


class TaskInput(NamedTuple):
    """A text, or a pair of texts, and the task (the expert) it belongs to."""

    text: str
    text_pair: str | None
    task: str


class HubSplit(NamedTuple):
    """Where the rows of a split are on the hub."""

    dataset: str
    configuration: str
    split: str


class Task(abc.ABC):
    """One task. A new kind of task implements this class and nothing else needs to know of it.

    `metric` is what the harness calls the score. `shots` is the number of few-shot examples that stand before a
    question. `is_regression` says that the answer is a number and not one of several labels.
    """

    name: str
    metric: str
    task_type: ClassVar[TaskType]
    shots: int = 0
    is_regression: bool = False

    @abc.abstractmethod
    def check(self, row: Row, where: str) -> None:
        """Raise an InputError that begins with `where` unless `row` has the task's texts and a valid label."""

    @abc.abstractmethod
    def inputs(self, rows: Sequence[Row], pool: Sequence[Row]) -> list[TaskInput]:
        """Return what a model reads of rows, as they are scored; few-shot examples are taken from `pool`."""

    @abc.abstractmethod
    def training_inputs(self, rows: Iterable[tuple[str, Row]], pool: Sequence[Row]) -> Iterator[TaskInput]:
        """Yield what a router is trained on, of (where, row) pairs; `where` begins an InputError."""

    @abc.abstractmethod
    def hub_split(self, split: str) -> HubSplit:
        """Return where the rows of `split` are on the hub; InputError where the data set has none."""

    def answer(self, row: Row) -> str | None:
        """Return the text that a language model should answer, None where a label is the answer."""
        return None

    def scoring_order(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows in the order in which they are scored, of which a limit takes the first."""
        return list(rows)

    def of_hub_split(self, rows: Sequence[Row], split: str) -> list[Row]:
        """Return which rows of the hub's split belong to `split`."""
        return list(rows)


def joined(text: str, text_pair: str | None) -> str:
    """Return a row's texts as one string, the second on a line of its own: a harness's context."""
    return text if text_pair is None else f"{text}\n{text_pair}"
