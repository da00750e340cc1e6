"""Reference rows that no model answers: a constant answer, and an article's first sentences as its summary."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from twin_bench.data.generative import GenerativeTask
from twin_bench.data.rows import TaskRows
from twin_bench.merging.registry import Method, method_header, register
from twin_bench.protocols import PROTOCOLS

SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s+[^\sa-z])")
"""What may end a sentence: a mark, closing quotes, and something that is no small letter behind a space."""
ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|Rev|St|Jr|Sr|Gov|Sen|Rep|Gen|Col|Lt|Sgt|Capt|Cmdr|Adm|Maj|Inc|Co|Corp|Ltd|vs|"
    r"No|Jan|Feb|Aug|Sept|Oct|Nov|Dec)|\b[A-Za-z]\.[A-Za-z])\.$"
)
"""What ends in a dot and ends no sentence: titles, initials, U.S., p.m. and the like."""


class Asked(NamedTuple):
    """What a reference answers.

    `rows` is the task with its rows. `targets` are the expected answers of the rows that are scored, in the order of
    scoring, and `training` those of training rows. `training` is empty if the answers are free texts, and None if there
    are no training rows. `own_rows` says that the scored rows are the harness's own, and not those in `rows`.
    """

    rows: TaskRows
    targets: Sequence[Any]
    training: Sequence[Any] | None
    own_rows: bool


Answerer = Callable[[Asked], Sequence[Any] | None]
"""It returns the answers to all scored rows, or None where it has none."""


@dataclass(frozen=True, kw_only=True)
class ReferenceMethod(Method):
    """A row of the table that no model answers: `answer` returns the answers to a task's rows."""

    answer: Answerer


def reference_method(*, title: str) -> Callable[[Answerer], Answerer]:
    """Register the decorated function as the reference row of its own name."""

    def decorate(function: Answerer) -> Answerer:
        header = method_header(function, title=title, track="bound")
        register(ReferenceMethod(**header, protocols=PROTOCOLS, answer=function))
        return function

    return decorate


@reference_method(title="Constant answer")
def constant(asked: Asked) -> Sequence[Any] | None:
    """Give every row the most frequent training label, or the mean of the training rows' numbers.

    It is the floor of `gain`. Free texts have the empty answer, which scores 0. A task without training rows has no
    constant answer. Where a metric is not the accuracy, another constant may score more: a metric that rewards one
    class alone, such as F1, is best served by that class.
    """
    if asked.training is None:
        return None
    return [asked.rows.task.constant(asked.training)] * len(asked.targets)


@reference_method(title="First three sentences")
def lead_3(asked: Asked) -> Sequence[Any] | None:
    """Take an article's first three sentences as its summary (Lead-3): a reference to read, and no floor."""
    task = asked.rows.task
    if not isinstance(task, GenerativeTask) or task.article is None or asked.own_rows:
        return None
    scored = task.scoring_order(asked.rows.read(asked.rows.split))[: len(asked.targets)]
    return [" ".join(sentences(str(row[task.article]))[:3]) for row in scored]


def sentences(text: str) -> list[str]:
    """Return the sentences of a text. A dot behind an abbreviation ends none, so two sentences may stay one."""
    found, start = [], 0
    for end in SENTENCE_END.finditer(text):
        if not ABBREVIATION.search(text[start : end.end()]):
            found.append(text[start : end.end()].strip())
            start = end.end()
    return [one for one in (*found, text[start:].strip()) if one]
