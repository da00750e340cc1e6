"""Merge methods on the leaderboard: merge the experts and make a contender of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from twin_bench.contenders.context import Contender, Context, static_contender
from twin_bench.errors import UnsuitedError
from twin_bench.files import digest
from twin_bench.measured import Meter
from twin_bench.merging.by_name import merge_lazily
from twin_bench.merging.calibration import calibrate
from twin_bench.merging.registry import MergeMethod, StatisticsKind
from twin_bench.twin.builder import ORACLE_PARAMETERS
from twin_bench.twin.paper import merge_lora_factors


def merged_contenders(method: MergeMethod, context: Context) -> Iterator[Contender]:
    """Yield one merged model, or one for each expert's tasks where each expert has parameters of its own."""
    if "task" in method.inputs:
        for name in context.sources.experts:
            if tasks := context.names_of(name):
                yield _merged(method, context, tasks, {"task": name})
    elif method.statistics is not None:
        yield _calibrated(method, method.statistics, context)
    else:
        yield _merged(method, context, context.names, {})


def _merged(method: MergeMethod, context: Context, tasks: Sequence[str], inputs: Mapping[str, Any]) -> Contender:
    """Merge and return the contender for `tasks`. `inputs` are those that the method must be given."""
    with Meter(context.device) as meter:
        merged = _parameters(method, context, inputs)
        contender = static_contender(merged, tasks, context)
    contender = dataclasses.replace(contender, build=meter.taken)
    if method.stored is None:
        return contender
    sources, dtype = context.sources, next(iter(merged.values())).dtype
    shapes = [tensor.shape for tensor in merged.values()]
    stored = method.stored(shapes, len(sources.experts), dtype.itemsize)
    model = contender.parameters * dtype.itemsize
    return dataclasses.replace(
        contender,
        parameters=stored // dtype.itemsize,
        stored_bytes=contender.stored_bytes - model + stored,
    )


def _parameters(method: MergeMethod, context: Context, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the merged parameters of the backbone."""
    sources, options = context.sources, {**context.settings, **inputs}
    if context.protocol == "paper" and not sources.skeleton.head:
        return merge_lora_factors(method.name, sources.base, sources.experts, **options)
    base: Mapping[str, Tensor] = sources.base
    if context.protocol == "paper":  # biases are not merged: the true task's expert supplies them
        base = {name: sources.base[name] for name in sources.base if not ORACLE_PARAMETERS.search(name)}
    transposed = sources.skeleton.transposed
    merged = merge_lazily(method.name, base, sources.experts, transposed=transposed, device=context.device, **options)
    return {**sources.base, **merged}


def _calibrated(method: MergeMethod, kind: StatisticsKind, context: Context) -> Contender:
    """Merge with statistics of training rows. They are kept in the workspace for all methods that use their kind."""
    if context.protocol == "paper" and not context.sources.skeleton.head:
        raise UnsuitedError(
            f"protocol paper merges A and B of LoRA adapters, and {method.name} needs statistics of whole weights"
        )
    decisive = [kind, context.calibration_rows, context.seed, context.max_length]
    calibration = calibrate(
        kind,
        context.sources,
        context.tasks,
        context.workspace / f"{kind}-{digest(decisive)[:16]}",
        rows=context.calibration_rows,
        seed=context.seed,
        max_length=context.max_length,
        device=context.device,
        progress=context.progress,
    )
    contender = _merged(method, context, context.names, {"statistics": calibration.statistics})
    return dataclasses.replace(
        contender,
        build=contender.build.after(calibration.taken),
        notes={"calibration": {"statistics": kind, "split": "train", "rows": dict(calibration.rows)}},
    )
