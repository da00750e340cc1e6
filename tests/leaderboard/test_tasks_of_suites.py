"""What a suite makes of a task's settings, and what a table makes of its scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from twin_bench import Classification, InputError, task
from twin_bench.config import parse
from twin_bench.data.classification import labels_of
from twin_bench.data.task import LANGUAGE_MODELS, HubSplit, Row, Task, TaskInput, TaskType
from twin_bench.leaderboard.suite import Suite


def suite(tasks: Any) -> Suite:
    given = {"name": "s", "base_model": "b", "experts": {"a": "x", "b": "y"}, "data": "rows", "tasks": tasks}
    return parse(Suite, {**given, "methods": ["average"]})


def own(name: str, *labels: str | int, expert: str = "a") -> Classification:
    return Classification(name, ("text",), "acc", labels, expert=expert)


def test_one_head_has_its_labels_in_one_order() -> None:
    rude, toxic = own("rude", "no", "yes"), own("toxic", "harmless", "toxic")
    assert labels_of([rude, toxic, rude]) == {"a": [("no", "yes"), ("harmless", "toxic")]}
    assert labels_of([rude, own("calm", "yes", "no", expert="b")]) == {"a": [("no", "yes")], "b": [("yes", "no")]}
    with pytest.raises(InputError, match=r"rude and calm are both of expert 'a'.*: no, yes and yes, no do not fit"):
        labels_of([toxic, rude, own("calm", "yes", "no")])
    with pytest.raises(InputError, match="no, yes and a number do not fit"):
        labels_of([rude, own("score")])


@pytest.mark.parametrize(
    ("labels", "value", "found"),
    [
        (("no", "yes"), 1, 1),
        (("no", "yes"), "yes", 1),
        ((1, 0), 0, 1),
        (("1", "0"), "0", 1),
        (("1", "0"), 0, None),
        (("no", "yes"), "1", None),
        (("no", "yes"), True, 1),
        (("entailment", "not_entailment"), True, None),
        ((10, 20), 1, None),
        ((0, 1), True, 1),
        (("nein", "jä"), "jä", 1),
    ],
)
def test_a_rows_label_is_a_name_or_an_id_where_names_are_no_numbers(labels: Any, value: Any, found: int | None) -> None:
    asked = own("t", *labels)
    if found is not None:
        assert asked.target({"text": "x", "label": value}) == found
        return
    with pytest.raises(InputError, match="t needs one of: "):
        asked.target({"text": "x", "label": value})


@pytest.mark.parametrize("name", ["normalized", "protocol", "method", "gain", "storage"])
def test_a_task_is_not_called_like_a_column(name: str) -> None:
    with pytest.raises(InputError, match=f"task '{name}': a column of the table has this name"):
        suite({name: {"expert": "a"}})


@dataclass(frozen=True)
class Echo(Task):
    """A plugin's own kind of task."""

    name: str
    metric: str = "exact_match"
    expert: str | None = None
    split: str | None = None
    suits: ClassVar[tuple[TaskType, ...]] = LANGUAGE_MODELS

    def check(self, row: Row, where: str) -> None:
        """Accept every row."""

    def inputs(self, rows: Sequence[Row], pool: Sequence[Row]) -> list[TaskInput]:
        return [TaskInput(row["text"], None, self.owner) for row in rows]

    def training_inputs(self, rows: Iterable[tuple[str, Row]], pool: Sequence[Row]) -> Iterator[TaskInput]:
        yield from self.inputs([row for _, row in rows], pool)

    def hub_split(self, split: str) -> HubSplit:
        return HubSplit("me/echo", None, split)


def test_a_kind_of_task_of_ones_own_takes_an_expert_and_a_split() -> None:
    task(lambda: Echo("echo"))
    made = suite({"echo": {"expert": "b", "split": "test"}}).kinds["echo"]
    assert (type(made), made.expert, made.split) == (Echo, "b", "test")
    assert suite({"echo": {"expert": None}}).kinds["echo"].expert is None
    with pytest.raises(InputError, match="task echo: few_shot 3: echo takes none; leave it out"):
        _ = suite({"echo": {"expert": "b", "few_shot": 3}}).kinds
