"""A harness of another package scores a suite: tuning, the order of what is resumed, errors."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.cells import board_of, made_cell
from tests.support.suites import rows_of, run
from twin_bench.contenders import Contender
from twin_bench.errors import InputError
from twin_bench.leaderboard.harness import ENTRY_POINTS, Evaluated, Harness, Job, find_harness
from twin_bench.leaderboard.suite import Suite
from twin_bench.report.markdown import markdown
from twin_bench.results.stored import analysed
from twin_bench_lm_eval.harness import LmEval


class Counting(Harness):
    """Scores every model 0.5, and keeps the jobs."""

    name = "counting"
    jobs: list[Job] = []  # noqa: RUF012 (a test's)

    def check(self, suite: Suite) -> None:
        """Accept every suite."""

    def score(self, contender: Contender, job: Job) -> Evaluated:
        self.jobs.append(job)
        return Evaluated(0.5, 0.1, 10)


class Misnamed(Counting):
    """Has another harness' name."""

    name = "lm-eval"


@pytest.fixture(autouse=True)
def harnesses(monkeypatch: pytest.MonkeyPatch) -> None:
    found, load = importlib.metadata.entry_points, importlib.metadata.EntryPoint.load
    mine = {"counting": Counting, "misnamed": Misnamed}
    points = [importlib.metadata.EntryPoint(name, f"mine:{name}", ENTRY_POINTS) for name in mine]

    def with_mine(**group: str) -> Any:
        return [*found(**group), *(points if group.get("group") == ENTRY_POINTS else [])]

    monkeypatch.setattr(importlib.metadata, "entry_points", with_mine)
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: mine.get(self.name) or load(self))
    monkeypatch.setattr(Counting, "jobs", [])
    monkeypatch.setattr(LmEval, "score", lambda *_: pytest.fail("another harness was asked"))


def test_options_are_tuned_by_the_harness_that_scores(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "tasks": ["cola"], "methods": ["task_arithmetic"]}
    assert run(suite, tmp_path, "--harness", "counting", "--tune") == 0
    assert {method for _, method, _ in rows_of(tmp_path)} >= {"task_arithmetic", "task_arithmetic+tuned"}
    assert len(Counting.jobs) > 4  # the grid's as well


def test_tasks_keep_the_suites_order_when_a_cell_is_run_again(tiny: dict[str, Any], tmp_path: Path) -> None:
    suite = {**tiny, "methods": ["average"]}
    assert run(suite, tmp_path, "--harness", "counting") == 0
    before = (tmp_path / "out" / "leaderboard.md").read_text()
    (first,) = (tmp_path / "out" / "cells-counting" / "standard" / "pretrained").glob(f"{tiny['tasks'][0]}-*.json")
    first.unlink()
    assert run(suite, tmp_path, "--harness", "counting") == 0
    assert first.is_file()
    assert len(Counting.jobs) == 9 + 1
    after = (tmp_path / "out" / "leaderboard.md").read_text()
    header = next(line for line in before.splitlines() if line.startswith("| method"))
    assert header in after.splitlines()
    damaged = json.loads(first.read_text())
    first.write_text(json.dumps(damaged | {"content": damaged["content"] | {"score": 99.0}}))
    assert run(suite, tmp_path, "--harness", "counting") == 0
    assert rows_of(tmp_path)["standard", "pretrained", tiny["tasks"][0]]["score"] == 50.0


def test_a_build_that_nobody_timed_is_shown_as_such(tmp_path: Path) -> None:
    cells = [made_cell("pretrained"), made_cell("experts", build_seconds=None)]
    table = markdown(analysed(board_of(cells), tmp_path))
    assert "nan" not in table.lower()
    (line,) = [line for line in table.splitlines() if line.startswith("| experts ")]
    assert line.endswith(" n/a |")


def test_wrong_harnesses_are_named() -> None:
    with pytest.raises(InputError, match="unknown harness 'lmeval'; did you mean 'lm-eval'"):
        find_harness("lmeval")
    with pytest.raises(InputError, match="harness misnamed: mine:misnamed calls itself 'lm-eval'"):
        find_harness("misnamed")


def test_rows_without_an_answer_are_said_below_the_table(tmp_path: Path) -> None:
    set_aside = {"set_aside": "id4: a prompt of 70 tokens"}
    cells = [made_cell("pretrained", "cola"), made_cell("pretrained", "mrpc", notes=set_aside)]
    said = "pretrained (standard): scored without an answer on mrpc: id4: a prompt of 70 tokens."
    assert said in markdown(analysed(board_of(cells), tmp_path))
