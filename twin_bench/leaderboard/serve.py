"""From a leaderboard entry to the models that answer for it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from twin_bench.calibration import calibrate
from twin_bench.checkpoint import read_json
from twin_bench.data import TaskInput, scored_inputs, split_path
from twin_bench.errors import UnsuitedError
from twin_bench.glue import GLUE
from twin_bench.leaderboard.cells import digest, write_atomically
from twin_bench.leaderboard.suite import Entry, Suite, TwinOptions
from twin_bench.methods import StatisticsKind, merge_lazily
from twin_bench.methods.adamerging import learn_coefficients, merge_with_coefficients
from twin_bench.recipe import Recipe
from twin_bench.task_vectors import TaskVectors
from twin_bench.twin.build import ORACLE_PARAMETERS, build_twin
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.dawin import DawinClassifier, whole_task_vector
from twin_bench.twin.directory import read_manifest
from twin_bench.twin.entropy import entropy_gradient, unlabelled_batches
from twin_bench.twin.exclusive import Exclusive
from twin_bench.twin.model import PaperParts, Parts, Protocol, TwinModel, twin_class
from twin_bench.twin.separate import merge_separately
from twin_bench.twin.smile import install_smile
from twin_bench.twin.sources import Sources, load_model
from twin_bench.twin.wemoe import install_gates, learn_gates, mlp_layers, part_of


@dataclass(frozen=True)
class Served:
    """A model, the tasks it answers, and what it took.

    `parameters` are those stored, heads apart; `notes` go into each cell (how a router was chosen, say).
    """

    twin: TwinModel
    tasks: tuple[str, ...]
    build_seconds: float
    parameters: int
    notes: Mapping[str, Any]


def serve(
    entry: Entry,
    protocol: Protocol,
    suite: Suite,
    data: Path,
    sources: Sources,
    workspace: Path,
    progress: Progress,
    *,
    feature_cache: Path | None = None,
    rows: int | None = None,
) -> Iterator[Served]:
    """Yield the models of one entry: one for a merge or a twin, one a task where each has parameters of its own.

    A built twin and experts' statistics are kept in `workspace`, a folder that stands for the inputs they come from.
    `feature_cache` is the directory of the routers' features, if they are kept.
    `rows` of each task are scored (None: all): what learns at test time sees these and no others.

    Raises UnsuitedError where the method can't serve the suite's kind of models, or lacks what it needs.
    """
    if isinstance(entry.options, TwinOptions):
        yield _twin(entry.options, protocol, suite, data, workspace, feature_cache, progress)
    elif entry.method.name == "adamerging":
        yield _adamerging(entry, suite, data, sources, rows, progress)
    elif entry.method.name == "dawin":
        yield _dawin(entry, suite, sources)
    elif entry.method.name == "smile":
        yield _smile(entry, suite, sources)
    elif entry.method.name == "wemoe":
        yield _wemoe(entry, suite, data, sources, rows, progress)
    elif entry.method.function is None:
        for task, expert in sources.experts.items():
            served = _static(expert, (task,), protocol, suite, sources, time.perf_counter())
            yield dataclasses.replace(served, parameters=len(sources.experts) * served.parameters)
    elif "task" in entry.method.inputs:
        for task in suite.tasks:
            yield _merged(entry, (task,), protocol, suite, sources, {"task": task})
    elif entry.method.statistics is not None:
        yield _calibrated(entry, entry.method.statistics, protocol, suite, data, sources, workspace, progress)
    else:
        yield _merged(entry, suite.tasks, protocol, suite, sources, {})


def _calibrated(
    entry: Entry,
    kind: StatisticsKind,
    protocol: Protocol,
    suite: Suite,
    data: Path,
    sources: Sources,
    workspace: Path,
    progress: Progress,
) -> Served:
    """Merge with statistics of training rows, which are kept in `workspace` and serve every entry of their kind."""
    if protocol == "paper" and not sources.bones.head:
        raise UnsuitedError(
            f"protocol paper merges A and B of LoRA adapters, and {entry.method.name} has statistics of whole weights"
        )
    decisive = [kind, suite.calibration_rows, suite.seed, suite.max_length]
    calibration = calibrate(
        kind,
        sources,
        data,
        workspace / f"{kind}-{digest(decisive)[:16]}",
        rows=suite.calibration_rows,
        seed=suite.seed,
        max_length=suite.max_length,
        progress=progress,
    )
    served = _merged(entry, suite.tasks, protocol, suite, sources, {"statistics": calibration.statistics})
    return dataclasses.replace(
        served,
        build_seconds=served.build_seconds + calibration.seconds,
        notes={"calibration": {"statistics": kind, "split": "train", "rows": dict(calibration.rows)}},
    )


def _merged(
    entry: Entry,
    tasks: Sequence[str],
    protocol: Protocol,
    suite: Suite,
    sources: Sources,
    inputs: Mapping[str, Any],
) -> Served:
    """Merge, and serve the result for `tasks`; `inputs` are what the method must be given."""
    started = time.perf_counter()
    options = {**entry.settings(suite.seed), **inputs}
    base: Mapping[str, Tensor] = sources.base
    if protocol == "paper" and not sources.bones.head:
        merged = merge_separately(entry.method.name, sources.base, sources.experts, **options)
    else:
        if protocol == "paper":  # biases are not merged; the true task's expert supplies them
            base = {name: sources.base[name] for name in sources.base if not ORACLE_PARAMETERS.search(name)}
        merged = {**sources.base, **merge_lazily(entry.method.name, base, sources.experts, **options)}
    served = _static(merged, tasks, protocol, suite, sources, started)
    if entry.method.stored is None:
        return served
    bits = 8 * next(iter(merged.values())).element_size()
    return dataclasses.replace(served, parameters=entry.method.stored(served.parameters, len(sources.experts), bits))


def _static(
    parameters: Mapping[str, Tensor],
    tasks: Sequence[str],
    protocol: Protocol,
    suite: Suite,
    sources: Sources,
    started: float,
) -> Served:
    """Serve one set of parameters under the heads (and, under `paper`, the biases) of the experts of `tasks`."""
    parameters = dict(parameters.items())
    exclusive: dict[str, Exclusive] = {}
    if protocol == "paper" and sources.bones.head:
        biases = [name for name in parameters if ORACLE_PARAMETERS.search(name)]
        exclusive = {
            task: Exclusive({}, {n: sources.experts[task][n].float() - parameters[n].float() for n in biases})
            for task in tasks
        }
    parts = Parts(
        heads={task: sources.experts[task].head() for task in tasks if sources.bones.head},
        exclusive=exclusive,
        paper=PaperParts(),
    )
    kind = twin_class(sources.bones.task_type)
    twin = kind(
        load_model(sources, parameters, suite.dtype), sources.tokenizer, parts, protocol=protocol, routing="none"
    )
    count = _size(parameters)
    return Served(twin, tuple(tasks), time.perf_counter() - started, count, {})


def _adamerging(
    entry: Entry, suite: Suite, data: Path, sources: Sources, rows: int | None, progress: Progress
) -> Served:
    """Learn the coefficients on the rows that are scored, in float32, and serve the merge."""
    started = time.perf_counter()
    settings = entry.settings(suite.seed)
    inputs = _test_inputs(entry, suite, data, rows)
    in_float32 = suite.model_copy(update={"dtype": "float32"})
    twin = _static(sources.base, suite.tasks, "standard", in_float32, sources, started).twin
    assert isinstance(twin, TwinClassifier)
    batches = unlabelled_batches(
        twin, inputs, batch_size=settings["batch_size"], seed=settings["seed"], max_length=suite.max_length
    )
    tracked = progress.track(batches, total=settings["steps"], description="adamerging")
    vectors = TaskVectors(sources.base, sources.experts)
    coefficients = learn_coefficients(
        vectors,
        entropy_gradient(twin, iter(tracked)),
        scaling=settings["scaling"],
        steps=settings["steps"],
        learning_rate=settings["learning_rate"],
    )
    merged = merge_with_coefficients(vectors, coefficients)
    served = _static(merged, suite.tasks, "standard", suite, sources, started)
    return dataclasses.replace(served, notes=_adapted(inputs))


def _dawin(entry: Entry, suite: Suite, sources: Sources) -> Served:
    """Serve the base model with whole task vectors."""
    _require_classifiers(entry, suite)
    started = time.perf_counter()
    base = dict(sources.base.items())
    parts = Parts(
        heads={task: expert.head() for task, expert in sources.experts.items()},
        exclusive={task: whole_task_vector(expert, base, sources.bones) for task, expert in sources.experts.items()},
    )
    model = load_model(sources, base, suite.dtype)
    twin = DawinClassifier(model, sources.tokenizer, parts, scaling=entry.settings(suite.seed)["scaling"])
    stored = _size(base) + sum(map(_stored, parts.exclusive.values()))
    return Served(twin, tuple(suite.tasks), time.perf_counter() - started, stored, {})


def _smile(entry: Entry, suite: Suite, sources: Sources) -> Served:
    """Serve the base model with its linear layers replaced."""
    started = time.perf_counter()
    base = dict(sources.base.items())
    model = load_model(sources, base, suite.dtype)
    added = install_smile(model, TaskVectors(base, sources.experts), **entry.settings(suite.seed))
    parts = Parts(heads={task: expert.head() for task, expert in sources.experts.items() if sources.bones.head})
    twin = twin_class(sources.bones.task_type)(model, sources.tokenizer, parts, routing="none")
    return Served(twin, tuple(suite.tasks), time.perf_counter() - started, _size(base) + added, {})


def _wemoe(entry: Entry, suite: Suite, data: Path, sources: Sources, rows: int | None, progress: Progress) -> Served:
    """Merge all but the MLP blocks, and learn these blocks' gates on the rows that are scored, in float32."""
    started = time.perf_counter()
    settings = entry.settings(suite.seed)
    inputs = _test_inputs(entry, suite, data, rows)
    base = dict(sources.base.items())
    merged = merge_lazily("task_arithmetic", base, sources.experts, scaling=settings["scaling"])
    model = load_model(sources, base, "float32")
    mixed = {f"{path}.{kind}" for layers in mlp_layers(model) for path in layers for kind in ("weight", "bias")}
    model.load_state_dict({name: merged[name] for name in base if name not in mixed}, strict=False)
    vectors = {task: whole_task_vector(expert, base, sources.bones) for task, expert in sources.experts.items()}
    gates = install_gates(model, vectors, scaling=settings["scaling"], seed=settings["seed"])
    heads = {task: expert.head() for task, expert in sources.experts.items()}
    twin = TwinClassifier(model, sources.tokenizer, Parts(heads=heads), routing="none")
    batches = unlabelled_batches(
        twin, inputs, batch_size=settings["batch_size"], seed=settings["seed"], max_length=suite.max_length
    )
    tracked = progress.track(batches, total=settings["steps"], description="wemoe")
    learn_gates(twin, gates, iter(tracked), steps=settings["steps"], learning_rate=settings["learning_rate"])
    mixed_parts = [part_of(vector, mixed) for vector in vectors.values()]
    stored = _size(base) + sum(map(_stored, mixed_parts)) + sum(p.numel() for p in gates.parameters())
    dtype = next(tensor.dtype for tensor in base.values() if tensor.is_floating_point())
    twin = twin.to(getattr(torch, suite.dtype) if suite.dtype else dtype)
    return Served(twin, tuple(suite.tasks), time.perf_counter() - started, stored, _adapted(inputs))


def _size(parameters: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in parameters.values())


def _stored(vector: Exclusive) -> int:
    """Return how many numbers a task vector takes: of a matrix the fewer of its factors' and its own."""
    factors = sum(min(B.numel() + A.numel(), len(B) * A.shape[1]) for B, A in vector.factors.values())
    return factors + _size(vector.vectors)


def _test_inputs(entry: Entry, suite: Suite, data: Path, rows: int | None) -> list[TaskInput]:
    """Return the inputs that are scored, without their labels; regressions, which have no entropy, are left out.

    Raises UnsuitedError for a suite of language models.
    """
    _require_classifiers(entry, suite)
    tasks = [GLUE[task] for task in suite.tasks if not GLUE[task].is_regression]
    files = [split_path(data, task.name, suite.split) for task in tasks]
    return [row for task, file in zip(tasks, files, strict=True) for row in scored_inputs(task, data, file, rows)]


def _require_classifiers(entry: Entry, suite: Suite) -> None:
    if suite.task_type != "sequence_classification":
        raise UnsuitedError(f"{entry.method.name} reads how sure a classifier is; the suite is of language models")


def _adapted(inputs: Sequence[TaskInput]) -> dict[str, Any]:
    """Return the note of a model that has seen the inputs it is scored on."""
    return {"adapted_on": {"inputs": "unlabelled test inputs", "rows": dict(Counter(row.task for row in inputs))}}


def _twin(
    options: TwinOptions,
    protocol: Protocol,
    suite: Suite,
    data: Path,
    workspace: Path,
    feature_cache: Path | None,
    progress: Progress,
) -> Served:
    recipe = twin_recipe(options, suite, data)
    directory = workspace / digest(recipe.model_dump(mode="json"))[:16]
    took = directory.with_suffix(".json")  # beside the twin, whose own files depend on its inputs alone
    if not directory.is_dir():
        started = time.perf_counter()
        build_twin(recipe, directory, feature_cache=feature_cache, progress=progress)
        write_atomically(took, json.dumps({"build_seconds": time.perf_counter() - started}) + "\n")
    manifest = read_manifest(directory)
    routing = "task" if options.weights == "task" else "router"
    twin = TwinModel.from_pretrained(
        directory,
        protocol=protocol,
        routing=routing,  # type: ignore[arg-type]
        dtype=suite.dtype,
    )
    twin.feature_cache = feature_cache
    router = manifest["router"]
    notes = {} if options.weights == "task" else router.get("paper", {}) if protocol == "paper" else router
    return Served(
        twin,
        tuple(suite.tasks),
        float(read_json(took)["build_seconds"]),
        sum(manifest["parameters"].values()),
        {"router": {key: value for key, value in notes.items() if key != "paper"}},
    )


def twin_recipe(options: TwinOptions, suite: Suite, data: Path) -> Recipe:
    """Return the recipe that builds a twin entry of a suite."""
    router = {"data": str(data), **options.router}
    return Recipe.model_validate(
        {
            "base_model": suite.base_model,
            "experts": suite.expert_paths,
            "shared": options.shared.model_dump(),
            "exclusive": options.exclusive.model_dump(),
            "router": router,
            "seed": suite.seed,
            "max_length": suite.max_length,
            "dtype": suite.dtype,
        }
    )
