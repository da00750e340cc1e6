"""A run from its command line on: seeds, the matrix of experts, a plan, progress, lost samples, a reference row."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.asked import ask_directly
from tests.support.suites import rows_of, run
from twin_bench.results.board import Leaderboard
from twin_bench.results.samples import read_samples
from twin_bench.results.stored import load_leaderboard


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    return ask_directly(monkeypatch)


def board_of(folder: Path) -> Leaderboard:
    return load_leaderboard(folder / "out", draws=500)


def test_a_method_that_draws_has_a_cell_of_each_seed(tiny: dict[str, Any], tmp_path: Path, jobs: Any) -> None:
    suite = {**tiny, "tasks": ["cola", "mnli"], "seeds": 2, "seed": 5, "methods": ["dare_ties", "average"]}
    assert run(suite, tmp_path) == 0
    assert len(jobs) == 2 * (2 + 2 + 1)  # two bounds, two seeds, one average
    files = list((tmp_path / "out" / "cells" / "standard" / "dare_ties").glob("mnli-*.json"))
    cells = {cell["seed"]: cell for file in files for cell in [json.loads(file.read_text())["content"]]}
    assert cells.keys() == {5, 6}
    samples = {seed: read_samples(tmp_path / "out" / cell["samples"]) for seed, cell in cells.items()}
    assert list(samples[5].identities) == list(samples[6].identities)
    for seed, own in samples.items():
        assert 100 * own.score("acc") == pytest.approx(cells[seed]["score"])
    rows = board_of(tmp_path).cells.set_index(["method", "task"]).to_dict("index")
    found = rows["dare_ties", "mnli"]
    assert (found["seeds"], found["seed_scores"]) == (2, [cells[5]["score"], cells[6]["score"]])
    assert found["score"] == pytest.approx(np.mean(found["seed_scores"]))
    assert found["seed_spread"] == pytest.approx(np.std(found["seed_scores"], ddof=1))
    assert (rows["average", "mnli"]["seeds"], rows["average", "mnli"]["seed_spread"]) == (1, None)
    said = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "dare_ties (standard, 2 seeds): mean over the seeds; standard deviation: " in said
    jobs.clear()
    assert run({**suite, "seeds": 3}, tmp_path) == 0
    assert jobs == [("standard-dare_ties", "cola"), ("standard-dare_ties", "mnli")]  # the third seed alone
    assert rows_of(tmp_path)["standard", "dare_ties", "cola"]["seeds"] == 3


def test_the_matrix_has_every_expert_on_every_task(tiny: dict[str, Any], tmp_path: Path, jobs: Any) -> None:
    suite = {**tiny, "methods": []}
    assert run(suite, tmp_path) == 0
    assert board_of(tmp_path).matrix is None
    jobs.clear()
    assert run(suite, tmp_path, "--matrix") == 0
    assert sorted(task for _, task in jobs) == sorted(3 * tiny["tasks"])
    board = board_of(tmp_path)
    assert board.matrix is not None
    scores = {(line["expert"], line["task"]): line for line in board.matrix.to_dict("records")}
    assert scores.keys() == set(itertools.product(tiny["tasks"], repeat=2))
    own = board.cells[board.cells["method"] == "experts"].set_index("task")
    for task in tiny["tasks"]:
        for column in ("score", "ci_low", "ci_high"):
            assert scores[task, task][column] == pytest.approx(own[column][task]), task
    assert len({round(line["score"], 6) for (_, task), line in scores.items() if task == "stsb"}) > 1
    assert {method for _, method, _ in rows_of(tmp_path)} == {"pretrained", "experts", "constant"}


def test_a_plan_scores_nothing_and_after_the_run_there_is_nothing_to_score(
    tiny: dict[str, Any], tmp_path: Path, jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = {**tiny, "methods": ["average", "ties"], "rows": 20}
    assert run(suite, tmp_path, "--plan") == 0
    said = capsys.readouterr().out
    assert "tiny: 12 of 12 cells are to be scored" in said
    for task in tiny["tasks"]:
        (line,) = [line for line in said.splitlines() if line.startswith(f"{task} ")]
        assert line.split()[1:4] == ["20", "4", "4"]
    assert not list((tmp_path / "out").rglob("*.json"))
    assert not list((tmp_path / "out").rglob("*.parquet"))
    assert run(suite, tmp_path) == 0
    assert len(rows_of(tmp_path)) == 15
    capsys.readouterr()
    assert run(suite, tmp_path, "--plan") == 0
    assert "tiny: 0 of 12 cells are to be scored" in capsys.readouterr().out
    assert run({**suite, "methods": ["average", "ties", "slerp"]}, tmp_path, "--plan") == 0
    assert "tiny: 3 of 15 cells are to be scored" in capsys.readouterr().out


def test_each_new_cell_is_a_line_also_where_the_output_is_no_terminal(
    tiny: dict[str, Any], tmp_path: Path, jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = {**tiny, "tasks": ["cola", "mnli"], "methods": ["average"]}
    assert run(suite, tmp_path) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " rows, " in line]
    assert len(lines) == 8
    row = rows_of(tmp_path)["standard", "average", "mnli"]
    expected = f" standard average mnli: acc {row['score']:.2f} ± {row['stderr']:.2f} (30 rows, "
    assert [line.partition("/")[0] for line in lines if expected in line] != []
    assert run(suite, tmp_path) == 0
    assert " rows, " not in capsys.readouterr().err  # nothing new
    assert run(suite, tmp_path / "again", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_a_cell_whose_samples_are_gone_is_scored_again(tiny: dict[str, Any], tmp_path: Path, jobs: Any) -> None:
    suite = {**tiny, "tasks": ["cola", "mnli"], "methods": ["average"]}
    assert run(suite, tmp_path, "--log-samples") == 0
    before = rows_of(tmp_path)
    gone = tmp_path / "out" / before["standard", "average", "mnli"]["samples"]
    whole = read_samples(gone)
    assert whole.texts is not None
    gone.unlink()
    jobs.clear()
    assert run(suite, tmp_path) == 0
    assert jobs == [("standard-average", "mnli")]
    after = rows_of(tmp_path)
    assert after["standard", "average", "mnli"]["score"] == before["standard", "average", "mnli"]["score"]
    assert read_samples(gone).predictions == whole.predictions
    assert read_samples(gone).texts is None  # texts are kept on demand


def test_a_reference_that_there_is_not_is_known_before_a_cell_is_scored(
    tiny: dict[str, Any], tmp_path: Path, jobs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = {**tiny, "tasks": ["mnli"], "methods": ["average", {"mine": {"method": "ties"}}]}
    assert run(suite, tmp_path, "--compare-to", "averge") == 2
    assert "--compare-to averge: no such row; did you mean 'average'" in capsys.readouterr().err
    assert not jobs
    assert run(suite, tmp_path, "--compare-to", "mine") == 0
    comparisons = json.loads((tmp_path / "out" / "comparisons.json").read_text())
    assert {(line["method"], line["against"]) for line in comparisons if line["reason"] == "reference"} == {
        ("average", "mine")
    }
    assert run(suite, tmp_path, "--methods", "average", "--compare-to", "mine") == 0  # an earlier run's row
