"""Where a router sends the rows of each task: which expert has the largest weight, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from twin_bench.results.samples import WEIGHT

BINS = 20


@dataclass
class Routing:
    """The largest fusion weight of each row of a method.

    `counts[task][expert]` is the number of a task's rows of which the expert has the largest weight. `fallen[task]` is
    that of rows of which no expert has any: the shared expert answers them. `own` and `other` count the rows by the
    size of that weight, in BINS bins from 0 to 1: `own` where the expert is the task's own.
    """

    experts: list[str]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    fallen: dict[str, int] = field(default_factory=dict)
    own_experts: dict[str, str | None] = field(default_factory=dict)
    own: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=int))
    other: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=int))

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Routing | None:
        """Return an empty count for the experts that samples have weights of; None if they have none."""
        experts = [str(name).removeprefix(WEIGHT) for name in frame.columns if str(name).startswith(WEIGHT)]
        return cls(experts) if len(experts) > 1 else None

    def add(self, task: str, expert: str | None, frame: pd.DataFrame) -> None:
        """Count a task's rows. `expert` is the task's own."""
        weights = frame[[f"{WEIGHT}{name}" for name in self.experts]].to_numpy(dtype=float)
        largest = np.where((weights != 0).any(axis=1), weights.argmax(axis=1), -1)
        self.own_experts[task] = expert
        self.counts[task] = {name: int((largest == place).sum()) for place, name in enumerate(self.experts)}
        self.fallen[task] = int((largest == -1).sum())
        bins = np.clip((weights.max(axis=1) * BINS).astype(int), 0, BINS - 1)
        mine = np.array([place >= 0 and self.experts[place] == expert for place in largest], dtype=bool)
        self.own += np.bincount(bins[mine], minlength=BINS)
        self.other += np.bincount(bins[~mine], minlength=BINS)
