"""A leaderboard as data frames: cells, tasks, methods, comparisons, and the samples behind them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from twin_bench.errors import InputError, nearest
from twin_bench.results.samples import read_samples

PLACE = ("protocol", "method", "task")
"""The columns that name a cell."""


@dataclass(frozen=True)
class Leaderboard:
    """What a directory of results holds, as data frames. Scores, normalized scores and gains are in points.

    - `cells` has one line a protocol, method and task: score, ci_low, ci_high (95%), stderr, normalized, retention,
      gain, floor, n, seed, seeds, seed_scores, costs, settings, notes, key, and the path of its samples.
    - `tasks` has one line a protocol and task: the floor, the expert's score, and whether the expert is `weak`.
    - `summary` has one line a protocol and method: normalized with ci_low and ci_high, gain with gain_ci_low and
      gain_ci_high, retention, rank_low, rank_high, tie_group, costs.
    - `comparisons` has one line a protocol, method and reason (`best`, `reference`, `constant`): the difference of the
      normalized means from the method `against`, its interval, p, and p_holm.
    - `samples` has one line a row of each cell and seed: identity, prediction, target, score, fusion weights.
    - `matrix` has one line an expert and task, or is None.
    - `identity`, `methods`, `remarks` and `published` say what was compared.
    """

    directory: Path
    identity: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    remarks: Sequence[str]
    skipped: Sequence[Mapping[str, Any]]
    published: Sequence[Mapping[str, Any]]
    cells: pd.DataFrame
    tasks: pd.DataFrame
    summary: pd.DataFrame
    comparisons: pd.DataFrame
    matrix: pd.DataFrame | None = None
    speed: Mapping[str, Any] | None = None

    @property
    def protocols(self) -> list[str]:
        """The protocols, in the suite's order."""
        return list(dict.fromkeys(self.summary["protocol"]))

    @functools.cached_property
    def samples(self) -> pd.DataFrame:
        """The rows of all cells, with protocol, method, task and seed: see `rows`. A column that a cell lacks is NaN.

        The files are read when it is first asked for. Raises InputError for a damaged one.
        """
        read = [
            read_samples(self.directory / path).frame().assign(**{name: cell[name] for name in PLACE}, seed=seed)
            for cell in self.cells.to_dict("records")
            for path, seed in zip(cell["seed_samples"], cell["seed_numbers"], strict=True)
            if path is not None
        ]
        if not read:
            return pd.DataFrame(columns=[*PLACE, "seed", "identity", "prediction", "target", "score"])
        found = pd.concat(read, ignore_index=True)
        first = [*PLACE, "seed"]
        return found[[*first, *(column for column in found.columns if column not in first)]]

    def rows(self, protocol: str, method: str, task: str) -> pd.DataFrame:
        """Return a cell's rows: identity, prediction, target, score, and cluster, weight_EXPERT and text if there.

        Of several seeds it is the first. Raises InputError if there is no such cell, or its harness gave no samples.
        """
        cells = self.cells
        found = cells[(cells["protocol"] == protocol) & (cells["method"] == method) & (cells["task"] == task)]
        if found.empty:
            known = nearest(method, sorted(set(cells["method"])))
            raise InputError(f"{self.directory}: no cell of {method} on {task} under {protocol}{known}")
        path = found.iloc[0]["samples"]
        if path is None:
            raise InputError(f"{self.directory}: {method} on {task} has no samples: its harness gives none")
        return read_samples(self.directory / path).frame()
