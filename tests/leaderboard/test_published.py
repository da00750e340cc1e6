"""Published figures: their files, and which of them stand below a leaderboard."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import twin_bench.results.published as module
from tests.support.cells import board_of, made_cell
from twin_bench.data.glue import GLUE
from twin_bench.errors import InputError
from twin_bench.leaderboard.suite import read_suite
from twin_bench.paths import leaderboards_directory, shipped_suites
from twin_bench.report.files import write_report
from twin_bench.results.cells import Cell
from twin_bench.results.published import like_ours, paragraph, published
from twin_bench.results.stored import analysed

SUITES = sorted(file.stem for file in (leaderboards_directory() / "published").glob("*.yaml"))
ROWS = {"cola": 1001, "sst2": 872, "mrpc": 408, "stsb": 1001, "qqp": 1001, "mnli": 1001, "qnli": 1001, "rte": 277}
PER_INPUT = {task: min(n, 1000) for task, n in ROWS.items()}


@pytest.mark.parametrize("name", SUITES)
def test_published_figures_are_of_a_suites_tasks_and_their_means_are_right(name: str) -> None:
    assert name in shipped_suites()
    suite = read_suite(name)
    for figure in published(name):
        assert figure.tasks.keys() <= suite.kinds.keys()
        for task, scored in figure.tasks.items():
            kind = suite.kinds[task]
            named = kind.metric.partition(",")[0]
            assert named in ("", scored.metric.partition(",")[0])  # lm-eval's tasks may leave it to lm-eval
        if figure.scores and figure.mean is not None:
            mean = sum(figure.scores.values()) / len(figure.scores)
            assert figure.mean == pytest.approx(mean, abs=0.1), (figure.method, figure.source)
        assert "arXiv:" in figure.source


def test_the_papers_figures_have_the_means_that_were_worked_out_from_them() -> None:
    figures = {(figure.method, figure.compares): figure for figure in published("glue-roberta") if figure.scores}
    experts = figures["experts", "absolute"].scores
    for method, mean in (("pretrained", 41.70), ("task_arithmetic", 67.98), ("ties", 55.72)):
        scores = figures[method, "absolute"].scores
        assert sum(100 * scores[task] / experts[task] for task in GLUE) / 8 == pytest.approx(mean, abs=0.005)
    assert sum(figures["twin", "normalized"].scores.values()) / 8 == pytest.approx(95.83, abs=0.005)


def test_a_suite_without_published_figures_has_none() -> None:
    assert published("demo") == []
    assert like_ours([]) == []


def cells(protocol: str = "paper", rows: dict[str, int] = ROWS, method: str = "experts", **changes: Any) -> list[Cell]:
    own = {"suite": "glue-roberta", "protocol": protocol, **changes}
    return [made_cell(method, name, metric=GLUE[name].metric, n=n, **own) for name, n in rows.items()]


def like(own: list[Cell]) -> list[str]:
    return list(map(paragraph, like_ours([dataclasses.asdict(cell) for cell in own])))


def test_what_is_alike_stands_below_the_table(tmp_path: Path) -> None:
    board = analysed(board_of(cells()), tmp_path, draws=100)
    write_report(board, tmp_path)
    for file in ("leaderboard.md", "index.html"):
        said = (tmp_path / file).read_text()
        assert "Published (paper, absolute): task_arithmetic (scaling 0.29): cola 6.68, mnli 66.23" in said
        assert "twin (" not in said  # its rows were 1,000
        assert "WUDI" not in said  # at second hand
    assert board.remarks == like(cells())
    (twin,) = [said for said in like([*cells(), *cells(rows=PER_INPUT, method="twin")]) if ": twin (" in said]
    assert twin.startswith("Published (paper, normalized): twin (scaling 0.29, density 0.1): cola 101.06")


@pytest.mark.parametrize(
    "other",
    [
        cells("standard"),
        cells(rows={**ROWS, "cola": 5}),
        cells(rows={task: n for task, n in ROWS.items() if task != "rte"}),
        [dataclasses.replace(cell, metric="acc") for cell in cells()],
        [dataclasses.replace(cell, suite="mine") for cell in cells()],
    ],
    ids=["protocol", "rows", "tasks", "metric", "suite"],
)
def test_what_is_not_alike_is_not_set_beside(other: list[Cell]) -> None:
    assert like(cells())
    assert like(other) == []


@pytest.mark.parametrize(
    ("figure", "says"),
    [
        ("{method: ties, compares: absolute, tasks: {cola: {metric: mcc}}, source: S}", "neither scores nor a mean"),
        (
            "{method: ties, compares: absolute, tasks: {cola: {metric: mcc}}, scores: {rte: 1}, source: S}",
            "ties: scores of rte; tasks are cola",
        ),
        ("{method: ties, compares: relative, tasks: {cola: {metric: mcc}}, mean: 1, source: S}", "figures.0.compares"),
    ],
)
def test_a_wrong_file_is_said_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str, says: str
) -> None:
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "mine.yaml").write_text(f"figures:\n  - {figure}\n")
    monkeypatch.setattr(module, "leaderboards_directory", lambda: tmp_path)
    with pytest.raises(InputError, match=r"mine\.yaml") as raised:
        published("mine")
    assert says in str(raised.value)
