"""Figures that others have published for the models of a shipped suite, and which of them are like a run's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from twin_bench.config import Settings, parse, read_yaml
from twin_bench.errors import InputError
from twin_bench.paths import leaderboards_directory
from twin_bench.protocols import ProtocolName


class Scored(Settings):
    """How a task was scored: by which metric, as a suite's cells name it, on how many rows (None: not said)."""

    metric: str
    rows: int | None = Field(default=None, ge=1)


class Published(Settings):
    """The published scores of one method on a suite's tasks.

    - `method`: a method's name here, or its usual one; `options` are those with which it was run.
    - `protocol`: the one of docs/protocols.md that theirs equals, or None if it is another one or is not said.
    - `harness`: the one that scored, where prompts depend on it.
    - `compares`: `absolute` scores, or scores `normalized` by the experts' own. Both are in points.
    - `tasks`: the tasks that the figures are of.
    - `scores`: the score of each task; `mean`: the mean over all of them, as printed.
    - `source`: the paper or repository, and the place in it.
    - `second_hand`: it was read in another paper's or repository's summary, and not in the source.
    - `note`: what differs from this project's method or protocol.
    """

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    protocol: ProtocolName | None = None
    harness: Literal["lm-eval", "helm"] | None = None
    compares: Literal["absolute", "normalized"]
    tasks: dict[str, Scored] = Field(min_length=1)
    scores: dict[str, float] = Field(default_factory=dict)
    mean: float | None = None
    source: str
    second_hand: bool = False
    note: str | None = None

    @model_validator(mode="after")
    def _of_these_tasks(self) -> Published:
        if self.scores and self.scores.keys() != self.tasks.keys():
            raise InputError(f"{self.method}: scores of {', '.join(self.scores)}; tasks are {', '.join(self.tasks)}")
        if not self.scores and self.mean is None:
            raise InputError(f"{self.method}: neither scores nor a mean; give one")
        return self


class _File(Settings):
    figures: list[Published]


def published(suite: str) -> list[Published]:
    """Return the figures in leaderboards/published/{suite}.yaml, none if there is no such file.

    Raises:
        InputError: it names the file and the key that is wrong.
    """
    folder = leaderboards_directory() / "published"
    files = {file.stem: file for file in folder.glob("*.yaml")}
    return parse(_File, read_yaml(files[suite]), str(files[suite])).figures if suite in files else []


def like_ours(rows: Sequence[Mapping[str, Any]]) -> list[Published]:
    """Return the published figures that may stand beside a leaderboard's own.

    Such a figure is of the same suite and protocol, at first hand, and its tasks are among the table's, by the same
    metrics, the same harness and on as many rows where it says them. A mean alone needs all tasks of the table.

    Args:
        rows: the rows of a leaderboard: suite, protocol, task, metric, n and notes of each cell.
    """
    found_alike = []
    for figure in published(rows[0]["suite"]) if rows else ():
        own = [row for row in rows if row["protocol"] == figure.protocol]
        found = {(row["task"], row["metric"], row["n"]) for row in own}
        known = found | {(task, metric, None) for task, metric, _ in found}
        helm = any("harness" in row["notes"] for row in own)
        alike = all((task, scored.metric, scored.rows) in known for task, scored in figure.tasks.items())
        whole = bool(figure.scores) or figure.tasks.keys() == {row["task"] for row in own}
        same_harness = figure.harness is None or (figure.harness == "helm") == helm
        if own and alike and whole and same_harness and not figure.second_hand:
            found_alike.append(figure)
    return found_alike


def paragraph(figure: Published) -> str:
    """Return a published figure in words, with its source."""
    options = ", ".join(f"{option} {value}" for option, value in figure.options.items())
    scores = ", ".join(f"{task} {score:.2f}" for task, score in figure.scores.items())
    mean = None if figure.mean is None else f"mean {figure.mean:.2f}"
    figures = "; ".join(part for part in (scores, mean) if part)
    named = f"{figure.method} ({options})" if options else figure.method
    note = f" {figure.note}" if figure.note else ""
    return f"Published ({figure.protocol}, {figure.compares}): {named}: {figures}. {figure.source}.{note}"
