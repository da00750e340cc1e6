"""The interface of a task: what a row is, what a model reads of a row, and how the answers are scored."""

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
    """One task. A new kind of task implements this class, and no other code changes.

    `metric` is the harness's name for the score. `shots` is the number of few-shot examples that stand before a
    question. `is_regression` says that the answer is a number and not one of several labels.
    """

    name: str
    metric: str
    task_type: ClassVar[TaskType]
    shots: int = 0
    is_regression: bool = False

    @property
    def has_dev(self) -> bool:
        """Whether the data set on the hub has a split of few-shot examples."""
        return False

    @abc.abstractmethod
    def check(self, row: Row, where: str) -> None:
        """Raise an InputError that begins with `where` unless `row` has the task's texts and a valid label."""

    @abc.abstractmethod
    def inputs(self, rows: Sequence[Row], pool: Sequence[Row]) -> list[TaskInput]:
        """Return a model's inputs for rows that are scored. Few-shot examples are taken from `pool`."""

    @abc.abstractmethod
    def training_inputs(self, rows: Iterable[tuple[str, Row]], pool: Sequence[Row]) -> Iterator[TaskInput]:
        """Yield a router's training inputs for (where, row) pairs. `where` begins an InputError."""

    @abc.abstractmethod
    def hub_split(self, split: str) -> HubSplit:
        """Return where the rows of `split` are on the hub. Raises InputError if the data set has no such split."""

    def answer(self, row: Row) -> str | None:
        """Return the text that a language model should answer, or None if the answer is a label."""
        return None

    def scoring_order(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows in the order in which they are scored. A limit takes the first of them."""
        return list(rows)

    def of_hub_split(self, rows: Sequence[Row], split: str) -> list[Row]:
        """Return those rows of the hub's split that belong to `split`."""
        return list(rows)


def joined(text: str, text_pair: str | None) -> str:
    """Return a row's texts as one string, which is a harness's context. The second text is on a line of its own."""
    return text if text_pair is None else f"{text}\n{text_pair}"
