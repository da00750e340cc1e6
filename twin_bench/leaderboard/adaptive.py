"""Methods that adapt to what they are given, a row, a token or the test inputs, and how each is set up."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.progress import Progress

from twin_bench.adaptive._dawin_model import DawinClassifier, whole_task_vector
from twin_bench.adaptive._smile_model import install_smile
from twin_bench.adaptive._wemoe_model import install_gates, learn_gates, mlp_layers, part_of
from twin_bench.adaptive.adamerging import learn_coefficients, merge_with_coefficients
from twin_bench.adaptive.entropy import Batches, entropy_gradient, unlabelled_batches
from twin_bench.adaptive.learning import Learning
from twin_bench.checkpoints.sources import Sources, load_model
from twin_bench.data.glue import GLUE
from twin_bench.data.rows import scored_inputs, split_path
from twin_bench.data.task import TaskInput
from twin_bench.errors import UnsuitedError
from twin_bench.files import digest
from twin_bench.leaderboard.served import Served, serve_static, size
from twin_bench.leaderboard.suite import Entry, Suite
from twin_bench.merging.registry import merge_lazily
from twin_bench.merging.task_vectors import TaskVectors
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.model import twin_class
from twin_bench.twin.parts import Parts


@dataclass(frozen=True)
class Adaptation:
    """What one entry adapts to: the suite's models and, of those that learn, its scored rows without their labels.

    `rows` of each task are scored (None: all). What is learnt is kept in `workspace`, a folder that stands for the
    models.
    """

    entry: Entry
    suite: Suite
    data: Path
    sources: Sources
    workspace: Path
    rows: int | None
    progress: Progress

    @property
    def settings(self) -> dict[str, Any]:
        """The entry's options, and the suite's seed where it draws."""
        return self.entry.settings(self.suite.seed)

    def require_classifiers(self) -> None:
        """Raise UnsuitedError for a suite of language models."""
        if self.suite.task_type != "sequence_classification":
            name = self.entry.method.name
            raise UnsuitedError(f"{name} reads how sure a classifier is; the suite is of language models")

    def inputs(self) -> list[TaskInput]:
        """Return the inputs that are scored, without their labels; regressions, which have no entropy, are left out.

        Raises UnsuitedError for a suite of language models.
        """
        self.require_classifiers()
        tasks = [GLUE[task] for task in self.suite.tasks if not GLUE[task].is_regression]
        files = [split_path(self.data, task.name, self.suite.split) for task in tasks]
        return [
            row
            for task, file in zip(tasks, files, strict=True)
            for row in scored_inputs(task, self.data, file, self.rows)
        ]

    def learning(self, inputs: Sequence[TaskInput]) -> Learning:
        """Return what earlier runs have learnt with these settings of these inputs, in whatever files they stood."""
        method, suite = self.entry.method.name, self.suite
        decisive = digest([self.settings, suite.tasks, suite.max_length, inputs])
        return Learning(self.workspace / f"{method}-{decisive[:16]}.safetensors")

    def batches(self, twin: TwinClassifier, inputs: Sequence[TaskInput], *, after: int) -> Iterator[Batches]:
        """Return the batches of `inputs` that learning takes, one a step, `after` the first so many steps."""
        settings = self.settings
        batches = unlabelled_batches(
            twin,
            inputs,
            batch_size=settings["batch_size"],
            seed=settings["seed"],
            max_length=self.suite.max_length,
        )
        tracked = self.progress.track(batches, total=settings["steps"], description=self.entry.method.name)
        return islice(tracked, after, None)


def _adamerging(given: Adaptation) -> Served:
    """Learn the coefficients on the rows that are scored, in float32, and serve the merge."""
    started = time.perf_counter()
    suite, sources, settings = given.suite, given.sources, given.settings
    inputs = given.inputs()
    learning = given.learning(inputs)
    started -= learning.seconds
    in_float32 = suite.model_copy(update={"dtype": "float32"})
    twin = serve_static(sources.base, suite.tasks, "standard", in_float32, sources, started).twin
    assert isinstance(twin, TwinClassifier)
    vectors = TaskVectors(sources.base, sources.experts)
    coefficients = learn_coefficients(
        vectors,
        entropy_gradient(twin, given.batches(twin, inputs, after=learning.steps)),
        scaling=settings["scaling"],
        steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        learning=learning,
    )
    merged = merge_with_coefficients(vectors, coefficients)
    served = serve_static(merged, suite.tasks, "standard", suite, sources, started)
    return dataclasses.replace(served, notes=_adapted(inputs))


def _dawin(given: Adaptation) -> Served:
    """Serve the base model with whole task vectors."""
    given.require_classifiers()
    started = time.perf_counter()
    suite, sources = given.suite, given.sources
    base = dict(sources.base.items())
    parts = Parts(
        heads={task: expert.head() for task, expert in sources.experts.items()},
        exclusive={task: whole_task_vector(expert, base, sources.skeleton) for task, expert in sources.experts.items()},
    )
    model = load_model(sources, base, suite.dtype)
    twin = DawinClassifier(model, sources.tokenizer, parts, scaling=given.settings["scaling"])
    stored = size(base) + sum(map(_stored, parts.exclusive.values()))
    return Served(twin, tuple(suite.tasks), time.perf_counter() - started, stored, {})


def _smile(given: Adaptation) -> Served:
    """Serve the base model with its linear layers replaced."""
    started = time.perf_counter()
    suite, sources = given.suite, given.sources
    base = dict(sources.base.items())
    model = load_model(sources, base, suite.dtype)
    added = install_smile(model, TaskVectors(base, sources.experts), **given.settings)
    parts = Parts(heads={task: expert.head() for task, expert in sources.experts.items() if sources.skeleton.head})
    twin = twin_class(sources.skeleton.task_type)(model, sources.tokenizer, parts, routing="none")
    return Served(twin, tuple(suite.tasks), time.perf_counter() - started, size(base) + added, {})


def _wemoe(given: Adaptation) -> Served:
    """Merge all but the MLP blocks, and learn these blocks' gates on the rows that are scored, in float32."""
    started = time.perf_counter()
    suite, sources, settings = given.suite, given.sources, given.settings
    inputs = given.inputs()
    learning = given.learning(inputs)
    started -= learning.seconds
    base = dict(sources.base.items())
    merged = merge_lazily("task_arithmetic", base, sources.experts, scaling=settings["scaling"])
    model = load_model(sources, base, "float32")
    mixed = {f"{path}.{kind}" for layers in mlp_layers(model) for path in layers for kind in ("weight", "bias")}
    model.load_state_dict({name: merged[name] for name in base if name not in mixed}, strict=False)
    vectors = {task: whole_task_vector(expert, base, sources.skeleton) for task, expert in sources.experts.items()}
    gates = install_gates(model, vectors, scaling=settings["scaling"], seed=settings["seed"])
    heads = {task: expert.head() for task, expert in sources.experts.items()}
    twin = TwinClassifier(model, sources.tokenizer, Parts(heads=heads), routing="none")
    learn_gates(
        twin,
        gates,
        given.batches(twin, inputs, after=learning.steps),
        steps=settings["steps"],
        learning_rate=settings["learning_rate"],
        learning=learning,
    )
    mixed_parts = [part_of(vector, mixed) for vector in vectors.values()]
    stored = size(base) + sum(map(_stored, mixed_parts)) + sum(p.numel() for p in gates.parameters())
    dtype = next(tensor.dtype for tensor in base.values() if tensor.is_floating_point())
    twin = twin.to(getattr(torch, suite.dtype) if suite.dtype else dtype)
    return Served(twin, tuple(suite.tasks), time.perf_counter() - started, stored, _adapted(inputs))


ADAPTIVE: Mapping[str, Callable[[Adaptation], Served]] = MappingProxyType(
    {"adamerging": _adamerging, "dawin": _dawin, "smile": _smile, "wemoe": _wemoe}
)


def _stored(vector: Exclusive) -> int:
    """Return how many numbers a task vector takes: of a matrix the fewer of its factors' and its own."""
    factors = sum(min(B.numel() + A.numel(), len(B) * A.shape[1]) for B, A in vector.factors.values())
    return factors + size(vector.vectors)


def _adapted(inputs: Sequence[TaskInput]) -> dict[str, Any]:
    """Return the note of a model that has seen the inputs it is scored on."""
    return {"adapted_on": {"inputs": "unlabelled test inputs", "rows": dict(Counter(row.task for row in inputs))}}
