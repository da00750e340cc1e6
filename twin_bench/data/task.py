"""The interface of a task: what a row is, what a model reads of a row, and how the answers are scored."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from twin_bench.errors import InputError, nearest, shown
from twin_bench.files import digest_code

TaskType = Literal["sequence_classification", "causal_lm", "seq2seq_lm"]
"""The kind of model that answers a task."""
CLASSIFIERS: tuple[TaskType, ...] = ("sequence_classification",)
"""The kinds of models that answer with a label or a number."""
LANGUAGE_MODELS: tuple[TaskType, ...] = ("causal_lm", "seq2seq_lm")
"""The kinds of models that answer with a text."""
Row = Mapping[str, Any]


class TaskInput(NamedTuple):
    """A text, or a pair of texts, and the expert whose task it is."""

    text: str
    text_pair: str | None
    task: str


class HubSplit(NamedTuple):
    """Where the rows of a split are on the hub. A data set of one configuration needs no name of it."""

    dataset: str
    configuration: str | None
    split: str


class Asking(NamedTuple):
    """What a suite says of a known task. None leaves a value as the task has it.

    `hub` is another data set on the hub: its id and configuration.
    """

    expert: str | None
    split: str | None = None
    metric: str | None = None
    few_shot: int | None = None
    cluster: str | None = None
    hub: tuple[str, str | None] | None = None


class Task(abc.ABC):
    """One task. A new kind of task implements this class, and no other code changes.

    `expert` is the name of the expert that was trained for the task, or None if none was. `metric` is the name of the
    score. `suits` are the kinds of models that can answer. `shots` is the number of few-shot examples that stand before
    a question. `split` is the split that is scored, if it is not the suite's. `is_regression` says that the answer is a
    number and not one of several labels. `higher_is_better` and `percent` say how the score is read: whether more is
    better, and whether it is a fraction, which is shown times 100.
    """

    name: str
    expert: str | None
    metric: str
    suits: ClassVar[tuple[TaskType, ...]]
    shots: int = 0
    split: str | None = None
    is_regression: bool = False
    higher_is_better: bool = True
    percent: bool = True

    @property
    def has_dev(self) -> bool:
        """Whether the data set on the hub has a split of few-shot examples."""
        return False

    @property
    def owner(self) -> str:
        """The expert's name as a row's input has it: empty for a task that is nobody's."""
        return self.expert or ""

    @property
    def identity(self) -> dict[str, Any]:
        """What stands for the task in a key: its settings, and the code of a plugin's class or functions."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        code = {name: digest_code(getattr(value, "__module__", "")) for name, value in given.items() if callable(value)}
        kind = [type(self).__name__, *digest_code(type(self).__module__)]
        return {"kind": kind, **{n: v for n, v in given.items() if n not in code}, "code": code}

    def asked(self, asking: Asking) -> Task:
        """Return the task as a suite asks for it. InputError for a setting that this kind of task does not take.

        A kind that takes more than an expert and a split overrides this.
        """
        for key in ("metric", "few_shot", "cluster", "hub"):
            value = getattr(asking, key)
            if value is not None and value != getattr(self, key, None):
                raise InputError(f"{key} {shown(value)}: {self.name} takes none; leave it out")
        return dataclasses.replace(self, expert=asking.expert, split=asking.split)  # type: ignore[type-var]

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

    def expected(self, row: Row) -> Any | None:
        """Return the label, number or option that a row expects, or None if it is a free text."""
        return None

    def constant(self, answers: Sequence[Any]) -> Any:
        """Return the constant answer that is right most often by the training rows' answers.

        Of answers that are equally frequent it is the first in order. The empty text stands for no answers.
        """
        return max(sorted(set(answers)), key=Counter(answers).__getitem__, default="")

    def row_score(self, answer: Any, target: Any) -> float:
        """Return the score of one row: here 1 for the expected answer, else 0."""
        return float(answer == target)

    def scoring_order(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows in the order in which they are scored. A limit takes the first of them."""
        return list(rows)

    def of_hub_split(self, rows: Sequence[Row], split: str) -> list[Row]:
        """Return those rows of the hub's split that belong to `split`."""
        return list(rows)


def joined(text: str, text_pair: str | None) -> str:
    """Return a row's texts as one string, which is a harness's context. The second text is on a line of its own."""
    return text if text_pair is None else f"{text}\n{text_pair}"


def text_field(row: Row, field: str, where: str) -> str:
    """Return a field's text. Raises an InputError that begins with `where` if the field is missing or not text."""
    if field not in row:
        raise InputError(f"{where}: no field {field!r}{nearest(field, row)}")
    if not isinstance(row[field], str):
        raise InputError(f"{where}: field {field!r} is not a text but {shown(row[field])}")
    return str(row[field])


def require_cluster(row: Row, field: str | None, where: str) -> None:
    """Raise an InputError that begins with `where` unless a row has the field of its source, if there is one."""
    if field is not None and not isinstance(row.get(field), str | int):
        found = f"is {shown(row[field])}" if field in row else f"is not there{nearest(field, row)}"
        raise InputError(f"{where}: field {field!r}, which names the row's source, {found}; expected a text or number")
