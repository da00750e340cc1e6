"""What a harness says of the cells of a suite that is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.suites import rows_of, run
from twin_bench.contenders import Contender
from twin_bench.data.rows import TaskRows
from twin_bench.leaderboard.harness import Evaluated, Harness, Job
from twin_bench.results.samples import Samples
from twin_bench.twin.model import TwinModel


class Found(NamedTuple):
    """What the harness said of one method on one task, beside the row of the table."""

    twin: TwinModel
    asked: TaskRows
    evaluated: Evaluated
    row: dict[str, Any]

    @property
    def samples(self) -> Samples:
        return self.evaluated.samples


def found(harness: type[Harness], suite: dict[str, Any], folder: Path, *arguments: str) -> dict[tuple[str, str], Found]:
    """Run a suite through a harness. Return what it said of each method on each task."""
    kept: dict[tuple[str, str], tuple[TwinModel, TaskRows, Evaluated]] = {}
    score = harness.score

    def scored(self: Harness, contender: Contender, job: Job) -> Evaluated:
        evaluated = score(self, contender, job)
        kept[job.name.removeprefix("standard-"), job.asked.task.name] = contender.twin, job.asked, evaluated
        return evaluated

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "score", scored)
        assert run(suite, folder, *arguments) == 0
    rows = {(method, task): row for (_, method, task), row in rows_of(folder).items()}
    return {key: Found(*told, rows[key]) for key, told in kept.items()}


def assert_weights(one: Found, texts: list[tuple[str, str | None]], experts: list[str] | None) -> None:
    """Assert that a row's weights are what the twin says of its text, alone, and sum to 1."""
    alone = [one.twin.route_all(one.twin.encode([text]), experts and [experts[0]])[0].tolist() for text in texts]
    given = list(zip(*one.samples.weights.values(), strict=True))
    assert tuple(one.samples.weights) == one.twin.expert_names
    for own, expected in zip(given, alone, strict=True):
        assert own == pytest.approx(expected, abs=1e-6)
        assert sum(own) == pytest.approx(1, abs=1e-6)
