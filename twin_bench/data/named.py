"""Tasks that a harness brings: it has their rows, prompts and metrics, and a suite gives their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from twin_bench.data.task import LANGUAGE_MODELS, HubSplit, Row, Task, TaskInput, TaskType, text_field
from twin_bench.errors import InputError

NO_FRACTION = re.compile(
    r"(\w+_)?perplexity|bits_per_byte|logprob|(bleu|chrf|chrf\+\+|ter|rouge[0-9A-Za-z]*)(_max|_diff)?|\w*(mse|loss|length)"
)
"""Harnesses' metrics that are not from 0 to 1."""
LESS = re.compile(r"(\w+_)?perplexity|bits_per_byte|ter|brier_score|\w*(mse|loss)")
"""Harnesses' metrics of which less is better. Some tasks do not say so."""


@dataclass(frozen=True)
class NamedTask(Task):
    """A task that a harness knows by its name, or by a run entry.

    The harness scores it on its own rows. What a router or statistics are made from stands in {name}/train.jsonl, and
    under protocol paper what is scored in {name}/{split}.jsonl. The harness writes both: rows {"text": the prompt as it
    is scored, "answer": the text that is expected}.

    `metric` is the harness's name of the score, and empty until the harness has chosen one. `entry` is HELM's run
    entry. `few_shot` is the number of few-shot examples, if it is not the harness's own.
    """

    name: str
    expert: str | None = None
    metric: str = ""
    entry: str | None = None
    few_shot: int | None = None
    split: str | None = None
    higher_is_better: bool = True
    percent: bool = True
    suits: ClassVar[tuple[TaskType, ...]] = LANGUAGE_MODELS

    def scored_by(self, metric: str, *, higher_is_better: bool | None = None) -> NamedTask:
        """Return the task with its metric, which may have a filter's name after a comma, and how a score is read.

        `higher_is_better` is what the harness says, or None if it says nothing.
        """
        name = metric.partition(",")[0]
        better = not LESS.fullmatch(name) if higher_is_better is None else higher_is_better
        return replace(self, metric=metric, higher_is_better=better, percent=not NO_FRACTION.fullmatch(name))

    def check(self, row: Row, where: str) -> None:
        """Raise an InputError that begins with `where` unless `row` holds a prompt and an answer."""
        text_field(row, "text", where)
        text_field(row, "answer", where)

    def inputs(self, rows: Sequence[Row], pool: Sequence[Row]) -> list[TaskInput]:
        """Return the rows' prompts."""
        return [TaskInput(row["text"], None, self.owner) for row in rows]

    def training_inputs(self, rows: Iterable[tuple[str, Row]], pool: Sequence[Row]) -> Iterator[TaskInput]:
        """Yield the rows' prompts."""
        for where, row in rows:
            yield TaskInput(text_field(row, "text", where), None, self.owner)

    def answer(self, row: Row) -> str:
        """Return the text that a language model should answer."""
        return str(row["answer"])

    def hub_split(self, split: str) -> HubSplit:
        """Raise an InputError: the harness downloads the rows itself."""
        raise InputError(f"{self.name}: its rows are the harness's own")
