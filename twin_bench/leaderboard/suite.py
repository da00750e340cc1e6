"""Suites: the YAML that says which methods run on which tasks, experts and rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from twin_bench.config import Dtype, Seed, locate, parse, read_yaml, with_models_located
from twin_bench.data import TASKS
from twin_bench.data.glue import GLUE
from twin_bench.data.task import TaskType
from twin_bench.errors import InputError, nearest
from twin_bench.merging.calibration import ROWS
from twin_bench.merging.plugins import WithPlugins
from twin_bench.merging.registry import PROTOCOLS, Method, ProtocolName, Track, find_method, methods
from twin_bench.paths import leaderboards_directory

BOUNDS = ("pretrained", "experts")
LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
NAME = re.compile(r"[^\W_][\w .,:()/+-]{0,99}")
"""A suite's name stands in tables, pages and spreadsheets, where markup or a formula would act."""
MethodItem = str | dict[str, dict[str, Any] | None]
EMBEDDED = "embedded"
"""A suite's value for the demo's experts and rows."""
HUB = "hub"
"""A suite's value for the rows of the tasks' data sets on the hub."""


@dataclass(frozen=True)
class Entry:
    """One row of the leaderboard: a label, a method and its options.

    `protocols`, if given, are those of the suite's protocols under which it runs. `to_tune` says that its options are
    to be chosen on held-out training rows; `notes` then describe the choice.
    """

    label: str
    method: Method
    options: Mapping[str, Any]
    protocols: tuple[ProtocolName, ...] | None = None
    to_tune: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def track(self) -> Track:
        """The track of the method with these options."""
        return self.method.track_of(self.options)

    def settings(self, seed: int) -> dict[str, Any]:
        """Return all options as plain data, defaults included, with the suite's seed where the method draws."""
        return {**self.method.seeded(seed), **self.options}

    def runs_under(self, protocol: ProtocolName) -> bool:
        """Return whether the entry and its method run under a protocol."""
        listed = self.protocols is None or protocol in self.protocols
        return listed and self.method.runs_under(protocol, self.options)


class Suite(WithPlugins):
    """A leaderboard: base model, experts, rows, tasks, methods, protocols and seed.

    - `experts`: task to path or hub id; or one folder with an expert for each task; or `embedded`.
    - `data`: a directory of {task}/{split}.jsonl; or `hub`; or `embedded`.
    - `split`: the rows that are scored. Routers see train alone.
    - `methods`: names, or {label: {method: NAME, option: value}}. `method` may be left out if it equals the label. The
      option `protocol` restricts an entry to some of the suite's protocols.
    - `rows`: how many rows of a task are scored without --limit, by default all of them.
    - `dtype`: what the models compute in, by default the base model's.
    - `device`: cpu, cuda, mps or `auto`, the fastest of them.
    - `batch_size`: inputs in a forward pass. `auto` finds what fits a GPU where the harness can.
    - `calibration_rows`: how many training rows of each task may be used for statistics.
    - `plugins`: Python files that register methods or metrics; they are imported.
    - `helm`: a directory of HELM's raw files as under benchmark_output/scenarios, for --harness helm.
    """

    name: str
    base_model: str
    experts: dict[str, str] | str
    data: str
    tasks: list[str] = Field(default=list(GLUE), min_length=1)
    methods: list[MethodItem] = Field(default_factory=lambda: list[MethodItem](methods()))
    protocol: list[ProtocolName] = Field(default=["standard"], min_length=1)
    seed: Seed = 0
    split: str = "validation"
    max_length: int | None = Field(default=None, ge=2)
    rows: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    device: str | None = None
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 32
    calibration_rows: int = Field(default=ROWS, ge=1)
    helm: str | None = None

    @field_validator("protocol", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise InputError(
                f"name {name[:80]!r}: expected a letter or digit, then up to 99 letters, digits, spaces and _.,:()/+-"
            )
        return name

    @field_validator("protocol", "tasks")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{name!r} is listed twice; remove one")
        return names

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in TASKS:
                raise InputError(f"unknown task {task!r}{nearest(task, TASKS)}")
            if TASKS[task].task_type != TASKS[tasks[0]].task_type:
                raise InputError(
                    f"one of {tasks[0]} and {task} needs a classifier, the other a language model; split the suite"
                )
        return tasks

    @property
    def task_type(self) -> TaskType:
        """The kind of models that the suite compares."""
        return TASKS[self.tasks[0]].task_type

    @property
    def expert_paths(self) -> dict[str, str]:
        """Each task's expert."""
        if isinstance(self.experts, str):
            return {task: f"{self.experts}/{task}" for task in self.tasks}
        missing = [task for task in self.tasks if task not in self.experts]
        if missing:
            raise InputError(f"suite {self.name}: no expert for task {missing[0]!r}; add it to experts")
        return {task: self.experts[task] for task in self.tasks}

    def entries(self, only: list[str] | None = None) -> list[Entry]:
        """Return the rows to run: the bounds, then the suite's methods in their order, or those in `only`.

        A name in `only` that the suite does not list is a method with its defaults.
        """
        listed: dict[str, Entry] = {}
        for entry in map(entry_of, self.methods):
            _require_own_label(entry.label, listed)
            self._require_listed(entry)
            listed[entry.label] = entry
        if only is not None:
            known = {**dict.fromkeys(methods()), **dict.fromkeys(listed)}
            for name in only:
                if name not in known:
                    raise InputError(f"unknown method {name!r}{nearest(name, known)}")
            listed = {name: listed.get(name) or entry_of(name) for name in only}
        bounds = [listed.pop(name) if name in listed else entry_of(name) for name in BOUNDS]
        return [*bounds, *listed.values()]

    def _require_listed(self, entry: Entry) -> None:
        """Raise an InputError for an entry under a protocol that the suite does not run."""
        for protocol in entry.protocols or ():
            if protocol not in self.protocol:
                raise InputError(
                    f"{entry.label}: protocol {protocol} is not among the suite's ({', '.join(self.protocol)}); add it "
                    "there, or remove it here"
                )


def read_suite(name_or_file: str) -> Suite:
    """Read a suite: a file, or the name of one in leaderboards/."""
    file = Path(name_or_file)
    shipped = {path.stem: path for path in leaderboards_directory().glob("*.yaml")}
    if not file.is_file():
        if name_or_file not in shipped:
            raise InputError(f"no suite {name_or_file!r}: no such file{nearest(name_or_file, shipped)}")
        file = shipped[name_or_file]
    raw = with_models_located(read_yaml(file), file)
    for key in ("experts", "data", "helm"):  # experts: one folder for all tasks
        if key in raw:
            raw[key] = locate(raw[key], file)
    suite = parse(Suite, raw, str(file))
    try:
        suite.entries()
    except InputError as error:
        raise InputError(f"{file}: methods: {error}") from None
    return suite


def _require_own_label(label: str, others: Iterable[str]) -> None:
    """Raise an InputError for a label that another entry has, or that differs from it in case alone.

    Labels are names of folders, and some file systems ignore case.
    """
    for other in others:
        if label == other:
            raise InputError(f"two methods are labelled {label!r}; give one a label of its own")
        if label.lower() == other.lower():
            raise InputError(
                f"two methods are labelled {other!r} and {label!r}, which differ in case alone; rename one"
            )


def entry_of(item: MethodItem) -> Entry:
    """Return the entry of a suite's item: a method's name, or {label: {method: NAME, option: value}}."""
    if isinstance(item, str):
        item = {item: {}}
    if len(item) != 1:
        raise InputError(f"an item has one label, found {', '.join(item)}")
    ((label, given),) = item.items()
    if not LABEL.fullmatch(label):
        raise InputError(f"label {label!r}: letters, digits, '-', '_', '.' and '+' only")
    options = dict(given or {})
    method = find_method(str(options.pop("method", label)))
    if label in BOUNDS and method.name != label:
        raise InputError(f"label {label!r} belongs to a bound; give {method.name} another label")
    protocols = options.pop("protocol", None)
    if protocols is not None:
        protocols = tuple(protocols if isinstance(protocols, list) else [protocols])
        for protocol in protocols:
            if protocol not in PROTOCOLS:
                raise InputError(f"{label}: unknown protocol {protocol!r}{nearest(str(protocol), PROTOCOLS)}")
    try:
        method = method.given(options)
        return Entry(label, method, method.checked(options), protocols)
    except InputError as error:
        named = re.match(rf"{re.escape(label)}[: ]", str(error))  # the method's own messages begin with its name
        raise InputError(str(error) if named else f"{label}: {error}") from None
