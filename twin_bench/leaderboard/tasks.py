"""The tasks of a suite: what its YAML says of one, and the task that this makes."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from twin_bench.config import Settings
from twin_bench.data.classification import Classification
from twin_bench.data.metrics import find_metric
from twin_bench.data.named import NamedTask
from twin_bench.data.registry import TASKS
from twin_bench.data.task import Asking, Task
from twin_bench.errors import InputError

EMBEDDED = "embedded"
"""A suite's value for the demo's experts and rows."""
HUB = "hub"
"""A suite's value for the rows of the tasks' data sets on the hub."""


class HubRows(Settings):
    """Rows of a data set on the hub: its id, its configuration, and the split that is scored."""

    hub: str
    config: str | None = None
    split: str | None = None


Data = str | HubRows
"""Where rows are: a directory of {task}/{split}.jsonl; `hub`; `embedded`; or a data set on the hub."""


class TaskSettings(Settings):
    """What a suite says of one task. All keys may be left out.

    - `expert`: the expert that was trained for it, by default the one that is called like the task. With null the task
      is nobody's, and what merging does to general ability is read on it.
    - `metric`: a metric of `twin_bench.data.metrics` for a classifier's task; lm-eval's name for one of lm-eval's, with
      its filter where it has several (`"exact_match,strict-match"`); HELM's name for a run entry.
    - `few_shot`: how many examples stand before a question.
    - `split`: the split that is scored.
    - `text`, `text_pair`, `label`, `labels`: a classifier's own task. They are the fields of a row that hold the text,
      the second text of a pair and the label, and the labels in the order of the head's ids. Without `labels` the label
      is a number to be predicted.
    - `cluster`: the field of a row that names its source, where several rows share one.
    - `helm`: HELM's run entry, for --harness helm.
    - `data`: where its rows are, if not where the suite's are.
    """

    expert: str | None = None
    metric: str | None = None
    few_shot: int | None = Field(default=None, ge=0)
    split: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    labels: list[str | int] | None = Field(default=None, min_length=2)
    cluster: str | None = None
    helm: str | None = None
    data: Data | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _no_truths(cls, labels: Any) -> Any:
        """Refuse labels that YAML reads as true and false."""
        if isinstance(labels, list) and any(isinstance(label, bool) for label in labels):
            raise InputError('labels: yes, no, true and false are no texts in YAML; write them in quotes, "yes"')
        return labels

    @field_validator("labels")
    @classmethod
    def _once(cls, labels: list[str | int] | None) -> list[str | int] | None:
        for label in labels or ():
            if (labels or []).count(label) > 1:
                raise InputError(f"{label!r} is listed twice; remove one")
        return labels


def task_of(name: str, given: TaskSettings, data: Data | None) -> Task:
    """Return the task that a suite names.

    With `text` it is a classifier's task of the user's own, and with `helm` a run entry of HELM's. Otherwise it is one
    of TASKS if the suite says where its rows are, and lm-eval's task of that name if it does not or knows none.

    Args:
        name: the task's name.
        given: what the suite says of it.
        data: where its rows are, or None.

    Raises:
        InputError: keys that do not go together, or a metric that the task does not have.
    """
    expert = given.expert if "expert" in given.model_fields_set else name
    split = given.split or (data.split if isinstance(data, HubRows) else None)
    if given.text is not None:
        return _own(name, given, expert, split, data)
    for key in ("text_pair", "label", "labels"):
        if getattr(given, key) is not None:
            raise InputError(f"{key} without text: name the field of a row that holds its text")
    if given.helm is None and name in TASKS and data is not None:
        hub = (data.hub, data.config) if isinstance(data, HubRows) else None
        return TASKS[name].asked(Asking(expert, split, given.metric, given.few_shot, given.cluster, hub))
    if given.cluster is not None:
        raise InputError("cluster: the rows of this task are the harness's own; leave it out")
    return NamedTask(
        name, expert, metric=given.metric or "", entry=given.helm, few_shot=given.few_shot, split=given.split
    )


def _own(name: str, given: TaskSettings, expert: str | None, split: str | None, data: Data | None) -> Task:
    for key in ("few_shot", "helm"):
        if getattr(given, key) is not None:
            raise InputError(f"{key}: a classifier reads a row's own text and nothing else; leave it out")
    labels = tuple(given.labels or ())
    return Classification(
        name,
        (given.text or "",) if given.text_pair is None else (given.text or "", given.text_pair),
        _metric(given.metric or ("acc" if labels else "pearson_spearman"), labels),
        labels,
        given.label or "label",
        expert=expert,
        split=split,
        cluster=given.cluster,
        hub=(data.hub, data.config) if isinstance(data, HubRows) else None,
    )


def _metric(name: str, labels: tuple[str | int, ...]) -> str:
    """Return the name of a metric. InputError unless it can score these labels, or a number where there are none."""
    metric = find_metric(name)
    metric.require(len(labels) or 1, "metric")
    return metric.name
