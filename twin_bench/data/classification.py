"""Tasks of classifiers: a row's texts, its label or number, and the metric. GLUE's tasks and a user's own are these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from twin_bench.data.metrics import find_metric
from twin_bench.data.task import (
    CLASSIFIERS,
    Asking,
    HubSplit,
    Row,
    Task,
    TaskInput,
    TaskType,
    require_cluster,
    text_field,
)
from twin_bench.errors import InputError, nearest, shown

TRUTH = {True: ("true", "yes", "1"), False: ("false", "no", "0")}
"""The labels, in small letters, that JSON's true and false stand for."""
LARGEST_LABEL = 1e30
"""The size below which a number to be predicted must be. A correlation sums squares, which would overflow."""


@dataclass(frozen=True)
class Classification(Task):
    """One task: the fields of a row that hold its texts and its label, the labels, and the metric.

    `fields` holds one name for a single text and two for a pair. `metric` is one that `find_metric` knows.
    `labels` are in the order of the ids that the head gives them, and empty for a regression. A row's label is one of
    them, or its id where all labels are texts. JSON's true and false are the labels that say yes and no, of two labels.
    `hub` is the data set on the hub; `hub_splits` names its splits that are called otherwise there.
    """

    name: str
    fields: tuple[str, ...]
    metric: str
    labels: tuple[str | int, ...] = ()
    label: str = "label"
    expert: str | None = None
    split: str | None = None
    cluster: str | None = None
    hub: tuple[str, str | None] | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    suits: ClassVar[tuple[TaskType, ...]] = CLASSIFIERS

    @property
    def num_labels(self) -> int:
        """Size of the task's head: the number of labels, 1 for a regression."""
        return len(self.labels) or 1

    @property
    def is_regression(self) -> bool:  # type: ignore[override]
        """Whether the label is a number to be predicted, not one of several classes."""
        return not self.labels

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether a larger score is better."""
        return find_metric(self.metric).higher_is_better

    @property
    def percent(self) -> bool:  # type: ignore[override]
        """Whether the score is a fraction, shown times 100."""
        return find_metric(self.metric).percent

    @property
    def identity(self) -> dict[str, Any]:
        """What stands for the task in a key: its settings, and the code of a metric that a plugin gives it."""
        return {**super().identity, "metric": find_metric(self.metric).identity}

    def asked(self, asking: Asking) -> Classification:
        """Return the task with the expert, split, metric, cluster and data set that a suite gives it."""
        if asking.few_shot is not None:
            raise InputError("few_shot: a classifier reads a row's own text and nothing else; leave it out")
        changes: dict[str, Any] = {"expert": asking.expert, "split": asking.split, "cluster": asking.cluster}
        if asking.metric is not None:
            find_metric(asking.metric).require(self.num_labels, "metric")
            changes["metric"] = find_metric(asking.metric).name
        if asking.hub is not None and not _same_data(asking.hub, self.hub):
            changes |= {"hub": asking.hub, "hub_splits": {}}
        return dataclasses.replace(self, **changes)

    def check(self, row: Row, where: str) -> None:
        """Raise an InputError that begins with `where` unless `row` has the task's texts and one of its labels."""
        self.texts(row, where)
        self.target(row, where)
        require_cluster(row, self.cluster, where)

    def target(self, row: Row, where: str = "row") -> int | float:
        """Return the id of a row's label, or the number to be predicted. An InputError begins with `where`."""
        if self.label not in row:
            raise InputError(
                f"{where}: no field {self.label!r}{nearest(self.label, row)}; {self.name} needs {self._wanted}"
            )
        value = row[self.label]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.is_regression and number and abs(value) < LARGEST_LABEL:
            return float(value)
        for index, label in enumerate(self.labels):
            if value == label and type(value) is type(label):
                return index
        if self._has_ids and type(value) is int and 0 <= value < len(self.labels):
            return value
        if isinstance(value, bool) and len(self.labels) == 2:
            meant = [index for index, label in enumerate(self.labels) if str(label).lower() in TRUTH[value]]
            if len(meant) == 1:
                return meant[0]
        raise InputError(f"{where}: {self.label} {shown(value)}; {self.name} needs {self._wanted}")

    @property
    def _has_ids(self) -> bool:
        """Whether a row may name its label by the id: not if the labels are numbers themselves, also as texts."""
        return all(isinstance(label, str) and not label.strip("+-. ").isdecimal() for label in self.labels)

    @property
    def _wanted(self) -> str:
        if self.is_regression:
            return "a number"
        labels = enumerate(self.labels)
        return "one of: " + ", ".join(f"{index} {label}" if self._has_ids else str(label) for index, label in labels)

    def texts(self, row: Row, where: str = "row") -> tuple[str, str | None]:
        """Return a row's text and its second text (None for a single sentence). An InputError begins with `where`."""
        texts = [text_field(row, field, where) for field in self.fields]
        return texts[0], (texts[1] if len(texts) == 2 else None)

    def inputs(self, rows: Sequence[Row], pool: Sequence[Row]) -> list[TaskInput]:
        """Return the rows' texts."""
        return [TaskInput(*self.texts(row), self.owner) for row in rows]

    def training_inputs(self, rows: Iterable[tuple[str, Row]], pool: Sequence[Row]) -> Iterator[TaskInput]:
        """Yield the rows' texts; labels are not read."""
        for where, row in rows:
            yield TaskInput(*self.texts(row, where), self.owner)

    def expected(self, row: Row) -> int | float:
        """Return the id of a row's label, or the number to be predicted."""
        return self.target(row)

    def constant(self, answers: Sequence[Any]) -> Any:
        """Return the most frequent label, the mean of the numbers, or each label's share where probabilities score."""
        kind = find_metric(self.metric).answers
        if kind == "number":
            return math.fsum(answers) / len(answers)
        if kind == "probabilities":
            return [answers.count(label) / len(answers) for label in range(self.num_labels)]
        return super().constant(answers)

    def row_score(self, answer: Any, target: Any) -> float:
        """Return the score of one row: 1 or 0 for a label, its probability, or a number's squared error."""
        kind = find_metric(self.metric).answers
        if kind == "number":
            return float((answer - target) ** 2)
        return float(answer[target]) if kind == "probabilities" else super().row_score(answer, target)

    def hub_split(self, split: str) -> HubSplit:
        """Return where the rows are."""
        if self.hub is None:
            raise InputError(f"{self.name}: its rows are on no hub; give data: a directory, or hub: the data set's id")
        return HubSplit(*self.hub, self.hub_splits.get(split, split))


def _same_data(asked: tuple[str, str | None], own: tuple[str, str | None] | None) -> bool:
    """Whether a suite names the data set that the task has anyway, with its configuration or without."""
    return own is not None and asked[0] == own[0] and asked[1] in (None, own[1])


def labels_of(tasks: Iterable[Task]) -> dict[str, list[tuple[str | int, ...]]]:
    """Return the different labels of each expert's tasks, which are none for a regression.

    Tasks of language models have no labels. Raises InputError if two tasks of one expert, which has one head, have
    labels that can't both be its head's: another number of them, or the same ones in another order.
    """
    found: dict[str, list[Classification]] = {}
    for task in tasks:
        if not isinstance(task, Classification) or task.expert is None:
            continue
        for other in found.setdefault(task.expert, []):
            reordered = task.labels != other.labels and set(task.labels) == set(other.labels)
            if len(other.labels) != len(task.labels) or reordered:
                raise InputError(
                    f"tasks {other.name} and {task.name} are both of expert {task.expert!r}, whose head has one set of "
                    f"labels in one order: {_listed(other)} and {_listed(task)} do not fit"
                )
        found[task.expert].append(task)
    return {name: list(dict.fromkeys(task.labels for task in own)) for name, own in found.items()}


def _listed(task: Classification) -> str:
    return ", ".join(map(str, task.labels)) or "a number"
