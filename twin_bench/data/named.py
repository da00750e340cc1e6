"""Tasks that a harness brings: it has their rows, prompts and metrics, and a suite gives their names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from twin_bench.data.task import LANGUAGE_MODELS, HubSplit, Row, Task, TaskInput, TaskType, text_field
from twin_bench.errors import InputError, NotFiniteError, shown

FRACTION = re.compile(
    r"(\w+_)?(acc|accuracy|exact|em|match|f1|fscore|mcc|precision|recall|mrr|rate|frac|pct|correctness|equiv|verify|pass|"
    r"pearsonr?|spearmanr?)([_@]\w+)?|r@\d+|(rouge|bleu)_[0-9lL]"
)
"""Names of scores that are fractions, and are shown times 100. A score of any other name is shown as it is.

A harness does not say which unit its scores have."""
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
        return replace(self, metric=metric, higher_is_better=better, percent=FRACTION.fullmatch(name) is not None)

    def finite(self, score: Any) -> float:
        """Return a harness's score as a number, if a table can show it.

        Raises:
            NotFiniteError: NaN or inf.
            InputError: no number, or one above 1 (or below -1) of a score that is read as a fraction.
        """
        try:
            found = float(score)
        except (TypeError, ValueError):
            raise InputError(f"task {self.name!r}: {self.metric} is {shown(score)}; expected a number") from None
        if not math.isfinite(found):
            raise NotFiniteError(f"{self.metric} is {found}; the answers or the task's own function overflow")
        if self.percent and abs(found) > 1 + 1e-9:
            raise InputError(
                f"task {self.name!r}: {self.metric} is {found:g}, and a score of this name is read as a fraction from "
                "0 to 1; let the task return a fraction, or give its score another name"
            )
        return found

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
