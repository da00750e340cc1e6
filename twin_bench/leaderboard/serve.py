"""From a leaderboard entry to the models that answer for it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor

from twin_bench.checkpoints.sources import Sources
from twin_bench.errors import UnsuitedError
from twin_bench.files import digest, read_json, write_text
from twin_bench.leaderboard.adaptive import ADAPTIVE, Adaptation
from twin_bench.leaderboard.served import Served, serve_static
from twin_bench.leaderboard.suite import Entry, Suite, TwinOptions
from twin_bench.merging.calibration import calibrate
from twin_bench.merging.registry import StatisticsKind, merge_lazily
from twin_bench.twin.builder import ORACLE_PARAMETERS, build_twin
from twin_bench.twin.directory import read_manifest
from twin_bench.twin.model import TwinModel
from twin_bench.twin.paper import merge_lora_factors
from twin_bench.twin.parts import ProtocolName
from twin_bench.twin.recipe import Recipe


def serve(
    entry: Entry,
    protocol: ProtocolName,
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

    A built twin, experts' statistics and what is learnt at test time are kept in `workspace`, a folder that stands for
    the inputs they come from. `feature_cache` is the directory of the routers' features, if they are kept.
    `rows` of each task are scored (None: all): what learns at test time sees these and no others.

    Raises UnsuitedError where the method can't serve the suite's kind of models, or lacks what it needs.
    """
    if isinstance(entry.options, TwinOptions):
        yield _twin(entry.options, protocol, suite, data, workspace, feature_cache, progress)
    elif entry.method.name in ADAPTIVE:
        yield ADAPTIVE[entry.method.name](Adaptation(entry, suite, data, sources, workspace, rows, progress))
    elif entry.method.function is None:
        for task, expert in sources.experts.items():
            served = serve_static(expert, (task,), protocol, suite, sources, time.perf_counter())
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
    protocol: ProtocolName,
    suite: Suite,
    data: Path,
    sources: Sources,
    workspace: Path,
    progress: Progress,
) -> Served:
    """Merge with statistics of training rows, which are kept in `workspace` and serve every entry of their kind."""
    if protocol == "paper" and not sources.skeleton.head:
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
    protocol: ProtocolName,
    suite: Suite,
    sources: Sources,
    inputs: Mapping[str, Any],
) -> Served:
    """Merge, and serve the result for `tasks`; `inputs` are what the method must be given."""
    started = time.perf_counter()
    options = {**entry.settings(suite.seed), **inputs}
    base: Mapping[str, Tensor] = sources.base
    if protocol == "paper" and not sources.skeleton.head:
        merged = merge_lora_factors(entry.method.name, sources.base, sources.experts, **options)
    else:
        if protocol == "paper":  # biases are not merged; the true task's expert supplies them
            base = {name: sources.base[name] for name in sources.base if not ORACLE_PARAMETERS.search(name)}
        merged = {**sources.base, **merge_lazily(entry.method.name, base, sources.experts, **options)}
    served = serve_static(merged, tasks, protocol, suite, sources, started)
    if entry.method.stored is None:
        return served
    bits = 8 * next(iter(merged.values())).element_size()
    return dataclasses.replace(served, parameters=entry.method.stored(served.parameters, len(sources.experts), bits))


def _twin(
    options: TwinOptions,
    protocol: ProtocolName,
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
        write_text(took, json.dumps({"build_seconds": time.perf_counter() - started}) + "\n")
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
