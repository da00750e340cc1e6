"""A leaderboard with numbers drawn by a seed, as `load_leaderboard` returns one: no run and no file behind it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from twin_bench.results.board import Leaderboard

HOSTILE = '</script><img src=x onerror="window.hacked=1">\'"&`'
"""Markup, the end of a script and quotes, as rows and names of strangers may hold them."""
_STATIC = ("ties", "average", "task_arithmetic", "dare_ties", "breadcrumbs", "della", "fisher", "regmean", "consensus")
_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
_BOUNDS = ("pretrained", "experts", "constant")
_PUBLISHED = {
    "method": "ties",
    "options": {"scaling": 0.3},
    "protocol": "standard",
    "compares": "normalized",
    "scores": {"cola": 60.1, "sst2": 71.0},
    "mean": 65.5,
    "source": "The paper, table 2",
    "note": "Other experts.",
}


@dataclass(frozen=True)
class Drawn(Leaderboard):
    """A leaderboard whose samples are in memory."""

    frames: Mapping[tuple[str, str, str], pd.DataFrame] = field(default_factory=dict)

    def rows(self, protocol: str, method: str, task: str) -> pd.DataFrame:
        return self.frames[protocol, method, task]


def drawn_board(
    directory: Path,
    *,
    methods: int = 12,
    tasks: int = 8,
    protocols: int = 2,
    rows: int = 120,
    hostile: str = "",
    texts: bool = True,
) -> Drawn:
    """Return a board of `methods` that are no bounds, two of them twins with a router and one told the task.

    Rows have texts, which begin with `hostile`, as a method's and a task's name and the predictions of one do.
    Nothing is written: the samples are in memory.
    """
    names = _names(methods, hostile)
    tasked = [*_TASKS[:tasks]]
    tasked[-1] += hostile
    ruled = ["standard", "paper", "routed"][:protocols]
    frames = {
        (protocol, method, task): _samples(protocol, method, task, tasked, rows, hostile, texts)
        for protocol in ruled
        for method in names
        for task in tasked
    }
    return Drawn(directory=directory, frames=frames, **_of_frames(frames, _identity(tasked, ruled, rows), hostile))


def _names(methods: int, hostile: str) -> list[str]:
    """Return the bounds and so many other methods, the last with `hostile` in its name."""
    names = ["twin", "twin_last_layer", "twin_true_task", *_STATIC]
    names = [*names, *(f"merge_{number}+tuned" for number in range(methods))][:methods]
    names[-1] += hostile
    return [*_BOUNDS, *names]


def _of_frames(
    frames: dict[tuple[str, str, str], pd.DataFrame], identity: dict[str, Any], hostile: str
) -> dict[str, Any]:
    """Return what a board holds beside its samples."""
    tasks, protocols = [*identity["tasks"]], identity["protocols"]
    methods = dict.fromkeys(method for _, method, _ in frames)
    cells = pd.DataFrame(_cells(frames))
    summary = _ranked(pd.DataFrame([_line(cells, protocol, method) for protocol in protocols for method in methods]))
    return {
        "identity": identity,
        "methods": {method: _method(method) for method in methods},
        "remarks": [
            "Skipped: regmean++ (standard): it needs input statistics.",
            f"A remark with <b>markup</b>. {hostile}",
        ],
        "skipped": [],
        "published": [_PUBLISHED],
        "cells": cells,
        "tasks": pd.DataFrame([_task(cells, protocol, task) for protocol in protocols for task in tasks]),
        "summary": summary,
        "comparisons": _comparisons(summary),
        "matrix": _matrix(cells[(cells["protocol"] == protocols[0]) & (cells["method"] == "experts")], tasks),
        "speed": {"cases": {"soft": {"per_second": 116.6, "against": "plain", "ratio": 0.623}}},
    }


def _matrix(experts: pd.DataFrame, tasks: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "expert": expert,
                "task": task,
                "score": score * (1 if expert == task else 0.6),
                "ci_low": score * 0.55,
                "ci_high": score,
            }
            for expert in tasks
            for task, score in zip(experts["task"], experts["score"], strict=True)
        ]
    )


def _chances(*parts: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]))


def _skill(method: str, task: str) -> float:
    base = {"experts": 0.86, "pretrained": 0.5, "constant": 0.52, "twin_true_task": 0.86}.get(method)
    if base is None:
        base = 0.82 if "twin" in method else 0.52 + 0.12 * _chances("skill", method).random()
    return min(base + 0.05 * (_chances("task", task).random() - 0.5), 0.99)


def _samples(
    protocol: str, method: str, task: str, tasks: list[str], rows: int, hostile: str, texts: bool
) -> pd.DataFrame:
    shared, own = _chances("rows", task), _chances("answers", method, task, "" if "twin" not in method else protocol)
    targets = shared.integers(0, 2, rows)
    right = 0.6 * shared.random(rows) + 0.4 * own.random(rows) < 0.1 + 0.9 * _skill(method, task) * 0.95
    right[0] = method == "experts"
    frame = pd.DataFrame(
        {
            "identity": [hashlib.sha256(f"{task}{row}".encode()).hexdigest()[:16] for row in range(rows)],
            "prediction": np.where(right, targets, 1 - targets),
            "target": targets,
            "score": right.astype(float),
        }
    )
    if hostile and task == tasks[0]:
        frame["prediction"] = [f"{hostile}{value}" for value in frame["prediction"]]
    if "twin" in method:
        logits = own.normal(size=(rows, len(tasks))) + 3.5 * (np.arange(len(tasks)) == tasks.index(task))
        weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        for position, expert in enumerate(tasks):
            frame[f"weight_{expert}"] = weights[:, position].astype("float32")
    if texts:
        frame["text"] = [f"{hostile}Row {row} of {task}: " + "a sentence of some length " * 14 for row in range(rows)]
    return frame


def _cells(frames: dict[tuple[str, str, str], pd.DataFrame]) -> list[dict[str, Any]]:
    cells = []
    for (protocol, method, task), frame in frames.items():
        score, n = 100 * frame["score"].mean(), len(frame)
        expert = 100 * frames[protocol, "experts", task]["score"].mean()
        floor = 100 * frames[protocol, "constant", task]["score"].mean()
        error = math.sqrt(score * (100 - score) / n)
        router = {
            "layer": 3,
            "accuracy": 0.936,
            "task_accuracy": {task: 0.98},
            "selected_on": "held-out training rows",
            "selection_rows": 3015,
        }
        cells.append(
            {
                "suite": "drawn",
                "protocol": protocol,
                "method": method,
                "track": _method(method)["track"],
                "task": task,
                "expert": task,
                "metric": "acc",
                "higher_is_better": True,
                "percent": True,
                "score": score,
                "ci_low": score - 1.96 * error,
                "ci_high": score + 1.96 * error,
                "stderr": error,
                "normalized": 100 * score / expert,
                "retention": math.nan,
                "gain": 100 * (score - floor) / (expert - floor),
                "floor": floor,
                "n": n,
                "seed": 0,
                "seeds": 1,
                "seed_scores": [score],
                "seed_spread": None,
                "seconds": 3.1,
                "build_seconds": 2.5,
                "build_peak_bytes": 310e6,
                "model_seconds_per_row": 0.0052 if "twin" in method else 0.0031,
                "parameters": 22_700_000,
                "stored_bytes": 90.8e6,
                "relative_storage": _storage(method),
                "settings": {"shared": {"method": "task_arithmetic", "scaling": 0.29}, "density": 0.1},
                "notes": {"router": router} if "twin" in method else {},
                "device": "cpu",
                "versions": {"torch": "2.13.0"},
                "key": hashlib.sha256(f"{protocol}{method}{task}".encode()).hexdigest(),
                "samples": "samples/kept.parquet",
            }
        )
    return cells


def _storage(method: str) -> float:
    return {"experts": 8.0, "constant": 0.0}.get(method, 1.57 if "twin" in method else 1.0)


def _method(method: str) -> dict[str, Any]:
    track = "bound" if method in _BOUNDS else "per-input" if "twin" in method else "data-free"
    return {
        "title": method.replace("_", " ").capitalize(),
        "paper": "arXiv:2306.01708",
        "track": "task-id given" if method == "twin_true_task" else track,
        "summary": "theta_0 + scaling * sum_t tau_t.",
        "options": {"scaling": 0.3},
        "bound": method in _BOUNDS,
        "told_the_task": method == "twin_true_task",
        "draws": False,
    }


def _identity(tasks: list[str], protocols: list[str], rows: int) -> dict[str, Any]:
    data = {"metric": "acc", "data": "a folder of rows", "split": "test", "rows": rows}
    return {
        "suite": "drawn",
        "base_model": "a/model",
        "experts": {task: f"experts/{task}" for task in tasks},
        "tasks": {task: {"expert": task, **data, "synthetic": place == 0} for place, task in enumerate(tasks)},
        "seed": 0,
        "protocols": protocols,
        "harness": "lm-eval",
        "date": "2026-11-26T11:00:00+00:00",
        "command": "twin-bench leaderboard --suite drawn",
        "versions": {"twin-bench": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "commit": None,
        "machine": {"cores": 2, "cpu": "a processor"},
    }


def _task(cells: pd.DataFrame, protocol: str, task: str) -> dict[str, Any]:
    own = cells[(cells["protocol"] == protocol) & (cells["task"] == task)].set_index("method")
    floor, expert = own["score"]["constant"], own["score"]["experts"]
    return {
        "protocol": protocol,
        "task": task,
        "metric": "acc",
        "percent": True,
        "higher_is_better": True,
        "expert": task,
        "floor": floor,
        "expert_score": expert,
        "weak": task == "rte",
        "paired": True,
        "chance": 50.0,
        "rows": own["n"]["experts"],
        "clusters": 0,
    }


def _line(cells: pd.DataFrame, protocol: str, method: str) -> dict[str, Any]:
    own = cells[(cells["protocol"] == protocol) & (cells["method"] == method)]
    normalized, gain, first = own["normalized"].mean(), own["gain"].mean(), own.iloc[0]
    return {
        "protocol": protocol,
        "method": method,
        "track": first["track"],
        "bound": method in _BOUNDS,
        "told_the_task": method == "twin_true_task",
        "normalized": normalized,
        "ci_low": normalized - 3.0,
        "ci_high": normalized + 3.0,
        "stderr": 1.5,
        "gain": gain,
        "gain_ci_low": gain - 8,
        "gain_ci_high": gain + 8,
        "retention": math.nan,
        "retention_ci_low": math.nan,
        "retention_ci_high": math.nan,
        **{
            name: first[name]
            for name in (
                "parameters",
                "stored_bytes",
                "relative_storage",
                "build_seconds",
                "build_peak_bytes",
                "model_seconds_per_row",
            )
        },
    }


def _ranked(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary with ranks and groups: methods within 4 points of a group's first are in the group."""
    summary = summary.assign(rank_low=math.nan, rank_high=math.nan, tie_group=math.nan)
    for _, part in summary[~summary["bound"]].groupby(["protocol", "told_the_task"]):
        ordered = part.sort_values("normalized", ascending=False)
        group, first = 0, math.inf
        for line, value in ordered["normalized"].items():
            if first - value > 4 or not group:
                group, first = group + 1, value
            summary.loc[line, "tie_group"] = group
            summary.loc[line, "rank_low"] = 1 + (ordered["normalized"] > value + 4).sum()
            summary.loc[line, "rank_high"] = (ordered["normalized"] > value - 4).sum()
    return summary


def _comparisons(summary: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for protocol, part in summary.groupby("protocol", sort=False):
        scores = part.set_index("method")["normalized"]
        best = scores[[*part.loc[~part["bound"] & ~part["told_the_task"], "method"]]].idxmax()
        for reason, against in (("best", best), ("constant", "constant")):
            for method in scores.index.difference([against], sort=False):
                gap = scores[method] - scores[against]
                p = min(1.0, math.exp(-abs(gap)))
                lines.append(
                    {
                        "protocol": protocol,
                        "method": method,
                        "against": against,
                        "reason": reason,
                        "difference": gap,
                        "ci_low": gap - 3.2,
                        "ci_high": gap + 3.2,
                        "p": p,
                        "p_holm": min(1.0, 3 * p),
                        "sure": 3 * p < 0.05,
                    }
                )
    return pd.DataFrame(lines)
