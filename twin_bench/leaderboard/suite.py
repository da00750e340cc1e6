"""Suites: the YAML that says which methods run on which tasks, experts and rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from twin_bench.checkpoints.hub import model_inside
from twin_bench.config import Dtype, Seed, locate, parse, read_yaml, with_models_located
from twin_bench.data.classification import Classification, labels_of
from twin_bench.data.glue import GLUE
from twin_bench.data.task import CLASSIFIERS, Task
from twin_bench.errors import InputError, nearest
from twin_bench.leaderboard.tasks import Data, TaskSettings, task_of
from twin_bench.merging.calibration import ROWS
from twin_bench.merging.plugins import WithPlugins
from twin_bench.merging.registry import Method, find_method, methods
from twin_bench.paths import shipped_suites
from twin_bench.protocols import PROTOCOLS, ProtocolName, Track
from twin_bench.twin.recipe import RouterSettings

BOUNDS = ("pretrained", "experts", "constant", "lead_3")
"""The rows that every table begins with. `lead_3` has a score where there are articles."""
CHANCE = "chance"
"""The line of the table that shows random answers."""
LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
TASK = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+()-]*")
"""Tasks and labels are names of folders and files. Some of lm-eval's tasks have parentheses."""
COLUMNS = (
    "protocol",
    "method",
    "rank",
    "group",
    "normalized",
    "gain",
    "retention",
    "track",
    "storage",
    "kept",
    "build",
)
"""The columns of the table beside the tasks' own."""
NAME = re.compile(r"[^\W_][\w .,:()/+-]{0,99}")
"""A suite's name stands in tables, pages and spreadsheets, where markup or a formula would act."""
MethodItem = str | dict[str, dict[str, Any] | None]


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

    @property
    def told_the_task(self) -> bool:
        """Whether each row's task is given, so that a task that is nobody's can't be answered."""
        return "task" in self.method.sees or self.track == "task-id given"

    @property
    def draws(self) -> bool:
        """Whether the method draws, so that its scores depend on the seed."""
        return self.method.draws(self.options)

    def settings(self, seed: int) -> dict[str, Any]:
        """Return all options as plain data, defaults included, with the suite's seed where the method draws."""
        return {**self.method.seeded(seed), **self.options}

    def runs_under(self, protocol: ProtocolName) -> bool:
        """Return whether the entry and its method run under a protocol."""
        listed = self.protocols is None or protocol in self.protocols
        return listed and self.method.runs_under(protocol, self.options)


class Suite(WithPlugins):
    """A leaderboard: base model, experts, rows, tasks, methods, protocols and seed. docs/suites.md explains each key.

    - `experts`: expert to path or hub id; or one folder with an expert for each task; or `embedded`.
    - `data`: a directory of {task}/{split}.jsonl; or `hub`; or `embedded`; or {hub, config, split} of one data set.
        lm-eval's own tasks need none.
    - `split`: the rows that are scored. Routers see train alone.
    - `tasks`: names, of which each task and its expert are called alike; or {task: {expert: NAME, ...}}, see
        `TaskSettings`. A suite that gives a mapping merges all its experts, also those without a task.
    - `include_path`: a folder of lm-eval's task files.
    - `router`: settings of routers. With `data` they are trained on the rows there, {"text", "task": EXPERT}, and not
        on the tasks' own training rows.
    - `methods`: names, or {label: {method: NAME, option: value}}. `method` may be left out if it equals the label. The
      option `protocol` restricts an entry to some of the suite's protocols.
    - `rows`: how many rows of a task are scored without --limit, by default all of them.
    - `seeds`: how many seeds, `seed` and those after it, a method is run with if it draws.
    - `dtype`: what the models compute in, by default the base model's.
    - `device`: cpu, cuda, mps or `auto`, the fastest of them.
    - `batch_size`: inputs in a forward pass. `auto` finds what fits a GPU where the harness can.
    - `calibration_rows`: how many training rows of each expert's tasks may be used for statistics.
    - `allow_pickle`: read weights from pickles too.
    - `trust_remote_code`: let transformers run code that comes with a model.
    - `plugins`: Python files that register methods, metrics or tasks; they are imported.
    - `confirm_run_unsafe_code`: run tasks of lm-eval's that run code which the model writes.
    - `helm`: a directory of HELM's raw files as under benchmark_output/scenarios, for --harness helm.
    """

    name: str
    base_model: str
    experts: dict[str, str] | str
    data: Data | None = None
    tasks: list[str] | dict[str, TaskSettings | None] = Field(default=list(GLUE), min_length=1)
    include_path: str | None = None
    router: dict[str, Any] = Field(default_factory=dict)
    methods: list[MethodItem] = Field(default_factory=lambda: list[MethodItem](methods()))
    protocol: list[ProtocolName] = Field(default=["standard"], min_length=1)
    seed: Seed = 0
    seeds: int = Field(default=1, ge=1, le=100)
    split: str = "validation"
    max_length: int | None = Field(default=None, ge=2)
    rows: int | None = Field(default=None, ge=1)
    dtype: Dtype | None = None
    device: str | None = None
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 32
    calibration_rows: int = Field(default=ROWS, ge=1)
    helm: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    confirm_run_unsafe_code: bool = False

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
    def _once(cls, names: Any) -> Any:
        for name in names if isinstance(names, list) else ():
            if names.count(name) > 1:
                raise InputError(f"{name!r} is listed twice; remove one")
        return names

    @field_validator("tasks")
    @classmethod
    def _plain(cls, tasks: Any) -> Any:
        for name in tasks:
            if not TASK.fullmatch(name):
                raise InputError(f"task {name[:80]!r}: letters, digits, '-', '_', '.', '+', '(' and ')' only")
            if name in COLUMNS:
                raise InputError(f"task {name!r}: a column of the table has this name; give the task another")
        return tasks

    @field_validator("router")
    @classmethod
    def _settings_of_a_router(cls, router: dict[str, Any]) -> dict[str, Any]:
        parse(RouterSettings, {"data": "", **router})
        return router

    @property
    def kinds(self) -> dict[str, Task]:
        """The tasks by name. Raises InputError for one whose keys do not go together, or that has no such expert."""
        given = self.tasks if isinstance(self.tasks, dict) else dict.fromkeys(self.tasks)
        found: dict[str, Task] = {}
        for name, settings in given.items():
            settings = settings or TaskSettings()
            try:
                found[name] = task_of(name, settings, self.data if settings.data is None else settings.data)
            except InputError as error:
                raise InputError(f"task {name}: {error}") from None
        first = next(iter(found.values()))
        for name, task in found.items():
            if task.suits != first.suits:
                raise InputError(
                    f"one of {first.name} and {name} needs a classifier, the other a language model; split the suite"
                )
            if isinstance(task, Classification) and task.expert is None:
                raise InputError(f"task {name}: expert: null, but a classifier's answer comes from an expert's head")
        labels_of(found.values())
        return found

    def data_of(self, task: str) -> Data | None:
        """Return where a task's rows are."""
        settings = self.tasks.get(task) if isinstance(self.tasks, dict) else None
        return self.data if settings is None or settings.data is None else settings.data

    def on_rows_of(self, directory: Path, split: str) -> Suite:
        """Return the suite with the rows of {directory}/{task}/{split}.jsonl in place of its own."""
        tasks: Any = self.tasks
        if isinstance(tasks, dict):
            plain = {"data": None, "split": None}
            tasks = {name: given and given.model_copy(update=plain) for name, given in tasks.items()}
        return self.model_copy(update={"data": str(directory), "split": split, "tasks": tasks, "rows": None})

    @property
    def trust(self) -> dict[str, bool]:
        """What a model's files may do, as arguments of `open_sources` and keys of a recipe."""
        return {"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code}

    @property
    def classifies(self) -> bool:
        """Whether the suite compares classifiers, and not language models."""
        return next(iter(self.kinds.values())).suits == CLASSIFIERS

    @property
    def expert_paths(self) -> dict[str, str]:
        """Each expert's path or hub id, in the order in which the experts are merged."""
        named = dict.fromkeys(task.expert for task in self.kinds.values() if task.expert is not None)
        if isinstance(self.experts, str):
            if not named:
                raise InputError(f"suite {self.name}: no task names an expert; name the experts under experts")
            return {name: model_inside(self.experts, name) for name in named}
        for name in named:
            if name not in self.experts:
                task = next(task.name for task in self.kinds.values() if task.expert == name)
                known = nearest(name, self.experts) if self.experts else ""
                raise InputError(f"suite {self.name}: no expert for task {task!r}: no expert is named {name!r}{known}")
        if isinstance(self.tasks, dict):
            return dict(self.experts)
        return {name: self.experts[name] for name in named}

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
    shipped = shipped_suites()
    if not file.is_file():
        if name_or_file not in shipped:
            raise InputError(f"no suite {name_or_file!r}: no such file{nearest(name_or_file, shipped)}")
        file = shipped[name_or_file]
    raw = with_models_located(read_yaml(file), file)
    for block in (raw, raw.get("router"), *_blocks(raw.get("tasks"))):
        if isinstance(block, dict):
            for key in ("experts", "data", "helm", "include_path"):  # experts: one folder for all tasks
                if key in block and not (key == "helm" and block is not raw):  # a task's is a run entry
                    block[key] = locate(block[key], file)
    suite = parse(Suite, raw, str(file))
    for part, check in (("tasks", lambda: suite.kinds), ("methods", suite.entries)):
        try:
            check()
        except InputError as error:
            raise InputError(f"{file}: {part}: {error}") from None
    return suite


def _blocks(tasks: Any) -> list[Any]:
    return [*tasks.values()] if isinstance(tasks, dict) else []


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
    if label == CHANCE:
        raise InputError(f"label {CHANCE!r} is that of the line below the table; give {method.name} another label")
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
