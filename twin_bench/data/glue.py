"""The eight GLUE tasks in one table: fields, labels, metrics and splits, named as in the hub's nyu-mll/glue."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from twin_bench.data.task import HubSplit, Row, Task, TaskInput, TaskType
from twin_bench.errors import InputError, nearest


@dataclass(frozen=True)
class GlueTask(Task):
    """One task: the fields of a row that hold its text, its labels, and its metric.

    `fields` holds one name for a single sentence and two for a pair. `metric` is one of
    `twin_bench.data.metrics.METRICS`. `label_names` is in the order of the ids, and empty for a regression.
    """

    name: str
    fields: tuple[str, ...]
    metric: str
    label_names: tuple[str, ...] = ()
    task_type: ClassVar[TaskType] = "sequence_classification"

    @property
    def num_labels(self) -> int:  # type: ignore[override]
        """Size of the task's head: the number of labels, 1 for a regression."""
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:  # type: ignore[override]
        """Whether the label is a number to be predicted, not one of several classes."""
        return not self.label_names

    def check(self, row: Row, where: str) -> None:
        """Raise an InputError that begins with `where` unless `row` has the task's texts and one of its labels."""
        self.texts(row, where)
        label = row.get("label")
        if self.is_regression:
            if not isinstance(label, int | float) or isinstance(label, bool) or not math.isfinite(label):
                raise InputError(f"{where}: label {label!r}; {self.name} needs a number")
        elif type(label) is not int or not 0 <= label < self.num_labels:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(self.label_names))
            raise InputError(f"{where}: label {label!r}; {self.name} needs one of: {known}")

    def texts(self, row: Row, where: str = "row") -> tuple[str, str | None]:
        """Return a row's text and its second text (None for a single sentence). An InputError begins with `where`."""
        texts = [text_field(row, field, where) for field in self.fields]
        return texts[0], (texts[1] if len(texts) == 2 else None)

    def inputs(self, rows: Sequence[Row], pool: Sequence[Row]) -> list[TaskInput]:
        """Return the rows' texts."""
        return [TaskInput(*self.texts(row), self.name) for row in rows]

    def training_inputs(self, rows: Iterable[tuple[str, Row]], pool: Sequence[Row]) -> Iterator[TaskInput]:
        """Yield the rows' texts; labels are not read."""
        for where, row in rows:
            yield TaskInput(*self.texts(row, where), self.name)

    def hub_split(self, split: str) -> HubSplit:
        """Return where the rows are: MNLI's validation and test rows are the matched ones."""
        matched = self.name == "mnli" and split in ("validation", "test")
        return HubSplit("nyu-mll/glue", self.name, f"{split}_matched" if matched else split)


def text_field(row: Row, field: str, where: str) -> str:
    """Return a field's text. Raises an InputError that begins with `where` if the field is missing or not text."""
    if field not in row:
        raise InputError(f"{where}: no field {field!r}{nearest(field, row)}")
    if not isinstance(row[field], str):
        raise InputError(f"{where}: field {field!r} is not a text but {row[field]!r}")
    return str(row[field])


# The order is the task ids' order in the paper: cola 0 ... rte 7.
GLUE: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), "mcc", ("unacceptable", "acceptable")),
        GlueTask("sst2", ("sentence",), "acc", ("negative", "positive")),
        GlueTask("mrpc", ("sentence1", "sentence2"), "acc_f1", ("not_equivalent", "equivalent")),
        GlueTask("stsb", ("sentence1", "sentence2"), "pearson_spearman"),
        GlueTask("qqp", ("question1", "question2"), "acc_f1", ("not_duplicate", "duplicate")),
        GlueTask("mnli", ("premise", "hypothesis"), "acc", ("entailment", "neutral", "contradiction")),
        GlueTask("qnli", ("question", "sentence"), "acc", ("entailment", "not_entailment")),
        GlueTask("rte", ("sentence1", "sentence2"), "acc", ("entailment", "not_entailment")),
    )
}
