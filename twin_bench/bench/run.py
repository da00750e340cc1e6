"""The measurement of a twin: fusion against the plain model, the authors' per-sample merge and PEFT, in one run.

All cases answer the same encoded rows on the same machine in turn, round after round, after a warm-up. The figures are
medians. A ratio is taken against the plain model of the same round.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from twin_bench.bench.causal import causal_cases
from twin_bench.bench.classifier import classifier_cases
from twin_bench.bench.measure import Cases, measure
from twin_bench.errors import InputError, nearest
from twin_bench.merging.linear_algebra import truncated_svd
from twin_bench.twin.causal import NOT_CAUSAL, TwinCausalLM
from twin_bench.twin.classifier import TwinClassifier
from twin_bench.twin.device import AUTO
from twin_bench.twin.layers import TwinLinear
from twin_bench.twin.model import TwinModel
from twin_bench.twin.speed import measured_speed


def bench(
    twin_directory: Path,
    data: Path,
    *,
    split: str = "validation",
    rows: int = 512,
    batch_size: int = 32,
    rounds: int = 5,
    merged_rows: int = 16,
    device: str = AUTO,
    dtype: str | None = None,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the machine, the settings, each case's rate and its ratio to the plain model's, memory and build time.

    The cases are those of `classifier_cases` for a classifier's twin, and of `causal_cases` for a language model's.
    `device` is where all cases run; `auto` is cuda, else mps, else cpu. `memory` is given in fractions of the plain
    model's parameters: the factors, the joint bases, the fused copy, 1-D vectors. `build` is the time of
    `torch.linalg.svd(full_matrices=True)` divided by the time that the exclusive vectors take here. Both are the CPU's,
    so that they are measured only where the twin runs on it.
    """
    twin: Any = TwinModel.from_pretrained(twin_directory, device=device, dtype=dtype)
    options: Any = {"split": split, "rows": rows, "batch_size": batch_size}
    if isinstance(twin, TwinClassifier):
        cases = classifier_cases(twin, twin_directory, data, **options, merged_rows=merged_rows)
    elif isinstance(twin, TwinCausalLM):
        cases = causal_cases(twin, twin_directory, data, **options)
    else:
        raise InputError(f"{twin_directory}: {NOT_CAUSAL[twin.task_type]}; bench has no cases for it")
    cases = _chosen(cases, only)
    measured, unsupported = measure(cases, rounds, twin.device)
    return {
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": _device_name(twin.device),
            "speed": asdict(measured_speed(twin.device, twin.model.dtype)),
        },
        "versions": {package: version(package) for package in ("twin-bench", "torch", "transformers", "peft")},
        "settings": {
            "experts": len(twin.expert_names),
            "rows": rows,
            "batch_size": batch_size,
            "rounds": rounds,
            "dtype": str(twin.model.dtype),
        },
        "notes": dict(cases.notes),
        "unsupported": unsupported,
        "cases": measured,
        "memory": _memory(twin),
        "build": _build_times(twin) if twin.device.type == "cpu" and not only else {},
    }


def _chosen(cases: Cases, only: Sequence[str]) -> Cases:
    """Return the named cases, and those that they are compared with. Without names these are all."""
    if not only:
        return cases
    for name in only:
        if name not in cases.cases:
            raise InputError(f"bench: no case {name!r} for this twin{nearest(name, cases.cases)}")
    wanted = {*only, *(cases.cases[name].against for name in only)}
    return cases._replace(cases={name: case for name, case in cases.cases.items() if name in wanted})


def _memory(twin: TwinModel) -> dict[str, float]:
    """Return what fusion holds in memory beside the plain model, as fractions of the plain model's parameters."""
    plain = sum(parameter.numel() for parameter in twin.model.parameters())
    kinds = {"A": "factors", "B": "factors", "fused_weight": "fused"}
    held = {"factors": 0, "joint_bases": 0, "fused": 0, "vectors": 0}
    for layer in twin.fusion.layers:
        for name, tensor in getattr(layer, "_buffers", {}).items():
            if tensor is not None and name != "owner" and tensor.data_ptr() != layer.weight.data_ptr():
                kind = kinds.get(name, "joint_bases" if name.startswith("basis") else "vectors")
                held[kind] += tensor.numel()
    return {kind: numbers / plain for kind, numbers in held.items()}


def _build_times(twin: TwinModel) -> dict[str, float]:
    """Return how many times faster the exclusive vectors are computed than `torch.linalg.svd(full_matrices=True)`.

    One matrix of each shape that the experts change is measured, as the median of five. `low_rank` is the sum of all
    experts' vectors, which has the rank of one expert's difference from the shared expert. `full_rank` is a random
    matrix.
    """
    layers = {tuple(m.weight.shape): m for m in twin.model.modules() if isinstance(m, TwinLinear) and m.ranks[0]}
    seconds = {"low_rank": [0.0, 0.0], "full_rank": [0.0, 0.0]}
    generator = torch.Generator().manual_seed(0)
    for shape, layer in layers.items():
        low = torch.mm(*layer.factors()).float().cpu()
        for kind, matrix in (("low_rank", low), ("full_rank", torch.randn(shape, generator=generator))):
            seconds[kind][0] += _median_seconds(partial(torch.linalg.svd, matrix, full_matrices=True))
            seconds[kind][1] += _median_seconds(partial(truncated_svd, matrix, layer.ranks[0]))
    return {kind: full / ours for kind, (full, ours) in seconds.items() if ours}


def _median_seconds(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.processor() or "cpu"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
