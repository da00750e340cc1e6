"""The page as text: its answer, its charts, its size, and that no row or name of a stranger becomes markup."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from tests.support.board import HOSTILE, Drawn, drawn_board
from twin_bench.report.answer import answer
from twin_bench.report.charts import on_the_front
from twin_bench.report.markdown import markdown
from twin_bench.report.numbers import difference, duration, interval, probability, ranks, size
from twin_bench.report.page import LIMIT, page
from twin_bench.report.sections import REASONS, differences
from twin_bench.report.terminal import print_leaderboard
from twin_bench.report.wrong_rows import WrongRows


class Read(HTMLParser):
    """The elements of a page, the text of each script, and what any element would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.fetched += [f"{tag} {value}" for name, value in attrs if name == "src" or (tag == "link" and value)]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.scripts[-1] == "":
            self.scripts[-1] = data
        self.text.append(data)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return drawn_board(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def text(board: Drawn) -> str:
    return page(board)


def changed(board: Drawn, groups: dict[str, float], floored: set[str] | None, told: str | None = None) -> Drawn:
    """Return a board of these methods alone, with their tie groups, and those not surely better than a floor."""
    methods = [*groups, *([told] if told else [])]
    summary = pd.DataFrame(
        {
            "protocol": "standard", "method": methods, "bound": False, "told_the_task": [m == told for m in methods],
            "track": "data-free",
            "normalized": np.arange(len(methods), 0.0, -1), "ci_low": 0.0, "ci_high": 9.0,
            "tie_group": [groups.get(method, 1.0) for method in methods],
        }
    )  # fmt: skip
    columns = ["protocol", "method", "reason", "difference", "sure"]
    against = [] if floored is None else [["standard", one, "constant", 1.0, one not in floored] for one in groups]
    return dataclasses.replace(board, summary=summary, comparisons=pd.DataFrame(against, columns=columns))


@pytest.mark.parametrize(
    ("groups", "floored", "said"),
    [
        ({"a": 1, "b": 2, "c": 2}, set(), "a leads; all methods are surely better than a constant answer."),
        (
            {"a": 1, "b": 1, "c": 2},
            {"c"},
            "a and b lead and can't be told apart; c is not surely better than a constant answer.",
        ),
        (
            {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2},
            {"d", "e"},
            "a and 2 others lead and can't be told apart; 2 methods are not surely better than a constant answer.",
        ),
        (
            {"a": 1, "b": 1},
            {"a", "b"},
            "The two methods can't be told apart; none is surely better than a constant answer.",
        ),
        ({"a": 1, "b": 1, "c": 1}, None, "The 3 methods can't be told apart."),
        ({"a": 1}, {"a"}, "a is the only method; it is not surely better than a constant answer."),
        ({"a": 1}, set(), "a is the only method; it is surely better than a constant answer."),
        ({}, set(), "No method is ranked under this protocol."),
    ],
)
def test_the_answer_is_right_in_number_and_words(
    board: Drawn, groups: dict[str, float], floored: set[str] | None, said: str
) -> None:
    assert answer(changed(board, groups, floored), "standard") == [said]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"a": 1}, "a is the only method that is not told the task; it is surely better than a constant answer."),
        (
            {"a": 1, "b": 1, "c": 1},
            "The 3 methods that are not told the task can't be told apart; "
            "all are surely better than a constant answer.",
        ),
        (
            {"a": 1, "b": 2},
            "a leads; both methods that are not told the task are surely better than a constant answer.",
        ),
    ],
)
def test_a_method_that_is_told_the_task_is_spoken_of_apart(board: Drawn, groups: dict[str, float], said: str) -> None:
    assert answer(changed(board, groups, set(), told="t"), "standard") == [
        said,
        "t is told the task of each input and is ranked apart: it scores 1.0 (0.0 to 9.0).",
    ]


def test_a_leader_that_learned_on_the_scored_rows_is_said_to(board: Drawn) -> None:
    found = changed(board, {"a": 1, "b": 1, "c": 2, "d": 3}, None)
    tracks = ["per-input", "test-time", "data-free", "test-time"]
    found = dataclasses.replace(found, summary=found.summary.assign(track=tracks))
    assert answer(found, "standard") == [
        "a and b lead and can't be told apart.",
        "b is on the track test-time: it learned on the rows that are scored, without their labels.",
    ]


def test_methods_without_a_comparison_with_the_constant_answer_are_said_to_have_none(board: Drawn) -> None:
    found = changed(board, {"a": 1, "b": 2}, None)
    alone = pd.DataFrame({"protocol": "standard", "method": ["constant"], "bound": True, "told_the_task": False})
    tasks = board.tasks.assign(floor=[math.nan, *board.tasks["floor"][1:]])
    found = dataclasses.replace(found, summary=pd.concat([found.summary, alone]), tasks=tasks)
    assert answer(found, "standard") == [
        "a leads.",
        "No method is compared with the constant answer, which has no score on cola.",
    ]


def test_numbers_have_sensible_digits() -> None:
    assert interval(91.22, 89.04, 93.06) == "91.2 (89.0 to 93.1)"
    assert interval(-0.04, float("nan"), None) == "0.0"
    assert interval(0.01234, 0.0119, 0.0131, percent=False) == "0.0123 (0.0119 to 0.0131)"
    assert interval(1234.5, 99.94, 0.0, percent=False) == "1,234 (99.9 to 0)"
    assert difference(1.77, -0.61, 4.2) == "+1.8 (-0.6 to +4.2)"
    assert [probability(p) for p in (0.0001, 0.0123, 0.5)] == ["below 0.001", "0.012", "0.50"]
    assert [ranks(1, 4), ranks(2, 2)] == ["1 to 4", "2"]
    assert [size(86_904_960), duration(0.0052), duration(150), duration(3)] == [
        "86.9 MB",
        "5.20 ms",
        "2.50 min",
        "3.00 s",
    ]


def test_the_front_holds_what_nothing_beats() -> None:
    assert on_the_front([1, 1, 2, 2, 3], [50, 60, 60, 70, 70]) == [False, True, False, True, False]
    assert on_the_front([1, 1], [5, 5]) == [True, True]


def test_every_method_has_its_mark_line_and_cells(board: Drawn, text: str) -> None:
    expected = Counter(
        f"{line['method']}: {line['normalized']:.1f} ({line['ci_low']:.1f} to {line['ci_high']:.1f})"
        for line in board.summary[board.summary["tie_group"].notna()].to_dict("records")
    )
    shown_words = Counter(re.findall(r'aria-label="([^"]*), group', text))
    assert shown_words == {words: 2 * lines for words, lines in expected.items()}  # a wide chart and a narrow one
    details = json.loads(script(text, "details"))
    assert len(details["cells"]) == len(board.cells) == text.count("data-cell=")
    shown = {(one["protocol"], one["method"], one["task"]): dict(one["facts"]) for one in details["cells"]}
    for cell in board.cells.to_dict("records"):
        facts = shown[cell["protocol"], cell["method"], cell["task"]]
        assert facts["score"] == f"{cell['score']:.1f} ({cell['ci_low']:.1f} to {cell['ci_high']:.1f})"
        assert facts["digest"] == cell["key"]


def test_a_score_of_several_seeds_says_whose_rows_it_shows(board: Drawn) -> None:
    cells = board.cells.assign(seeds=2, seed_scores=[[50.0, 52.04]] * len(board.cells), seed_spread=1.4)
    facts = json.loads(script(page(dataclasses.replace(board, cells=cells)), "details"))["cells"][0]["facts"]
    assert dict(facts)["seeds"] == "2 (50.0, 52.0); the rows that it got wrong are the first seed's"


def script(text: str, name: str) -> str:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert found
    return found[1]


def test_a_cell_s_rows_are_those_that_it_got_wrong_beside_the_best(board: Drawn, text: str) -> None:
    details, rows = json.loads(script(text, "details")), json.loads(script(text, "rows"))
    best = board.summary.loc[(board.summary["tie_group"] == 1) & ~board.summary["told_the_task"]].iloc[0]["method"]
    for method, reference in (
        ("ties", best),
        (best, "experts"),
        ("twin_true_task", "experts"),
        ("constant", "experts"),
    ):
        cell = next(
            c for c in details["cells"] if (c["method"], c["task"], c["protocol"]) == (method, "sst2", "standard")
        )
        own, frame = rows["cells"][cell["rows"]], board.rows("standard", method, "sst2")
        wrong, others = frame[frame["score"] < 1], board.rows("standard", reference, "sst2")
        assert (own["against"], own["wrong"], own["graded"]) == (reference, len(wrong), "")
        task = rows["tasks"]["sst2"]
        for (place, prediction, other), row in zip(own["rows"], wrong.to_dict("index").items(), strict=True):
            identity, target, shown = task["rows"][place]
            assert (identity, target) == (row[1]["identity"], str(row[1]["target"]))
            assert len(shown) == 300
            assert shown[:-1] == row[1]["text"][:299]
            assert task["answers"][prediction] == str(row[1]["prediction"])
            assert task["answers"][other] == str(others["prediction"][row[0]])


def test_graded_rows_are_shown_from_the_worst() -> None:
    wrong = WrongRows()
    numbers = {"prediction": [1.0, 4.0, 2.5, 3.0], "target": [1.0, 1.5, 2.0, 3.25]}
    errors = [(a - b) ** 2 for a, b in zip(*numbers.values(), strict=True)]
    frame = pd.DataFrame({"identity": list("abcd"), **numbers, "score": errors})
    wrong.add(("standard", "m", "stsb"), frame, None, {})
    texts = pd.DataFrame(
        {"identity": list("abc"), "prediction": ["x", "y", "z"], "target": "t", "score": [0.4, 0.1, 1.0]}
    )
    wrong.add(("standard", "m", "cnn"), texts, "r", {"a": "q"})
    sure = pd.DataFrame(
        {"identity": list("ab"), "prediction": [[0.75, 0.25], [0.5, 0.5]], "target": 0, "score": [0.75, 0.5]}
    )
    wrong.add(("standard", "m", "mc"), sure, None, {})
    compact = wrong.compact(100)
    names = [
        [compact["tasks"][task]["rows"][row[0]][0] for row in cell["rows"]]
        for task, cell in zip(("stsb", "cnn", "mc"), compact["cells"], strict=True)
    ]
    assert names == [["b", "c", "d"], ["b", "a"], ["b", "a"]]
    assert [cell["graded"] for cell in compact["cells"]] == ["squared error", "score", "score"]
    assert compact["tasks"]["mc"]["answers"] == ["0.5, 0.5", "0.75, 0.25"]
    assert compact["cells"][1]["rows"] == [[0, 0, -1, 0.1], [1, 1, 2, 0.4]]
    assert compact["tasks"]["cnn"]["answers"] == ["y", "x", "q"]


def test_nothing_of_a_stranger_becomes_markup(tmp_path: Path, text: str) -> None:
    tame, wild = Read(text), Read(page(drawn_board(tmp_path, hostile=HOSTILE)))
    assert wild.tags.count("img") == wild.tags.count("b") == 0
    assert len(wild.scripts) == len(tame.scripts) == 3
    assert wild.scripts[2] == tame.scripts[2]
    assert wild.handlers == wild.fetched == []
    rows = json.loads(wild.scripts[1])
    assert any(shown.startswith(HOSTILE) for task in rows["tasks"].values() for _, _, shown in task["rows"])
    assert any(answer.startswith(HOSTILE) for task in rows["tasks"].values() for answer in task["answers"])
    assert any(HOSTILE in part for part in wild.text)  # names, as text


def test_a_large_board_stays_below_the_limit_with_fewer_rows_a_cell(tmp_path: Path) -> None:
    large = page(drawn_board(tmp_path, methods=30, protocols=3, rows=800))
    assert LIMIT - 150_000 < len(large.encode()) < LIMIT
    cells = json.loads(script(large, "rows"))["cells"]
    most = max(len(cell["rows"]) for cell in cells)
    assert 5 < most < 100
    assert all(len(cell["rows"]) == min(most, cell["wrong"]) for cell in cells)
    assert f"Each score holds the first {most} of them here" in large


def test_a_board_that_is_too_large_without_any_row_leaves_out_more_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First what scores open, then the charts. 12 methods under 2 protocols take half a megabyte without rows."""
    board = drawn_board(tmp_path, texts=False)
    sizes = []
    for limit, charts in ((480_000, True), (300_000, False)):
        monkeypatch.setattr("twin_bench.report.page.LIMIT", limit)
        text = page(board)
        sizes.append(len(text.encode()))
        assert sizes[-1] < limit
        assert "No score opens its settings and rows here, so that this page stays below 3 MB." in text
        assert "data-cell=" not in text
        assert json.loads(script(text, "details")) == json.loads(script(text, "rows")) == {}
        assert ("Ranking with 95% intervals" in text) == charts
        assert ("Left out, so that this page stays below 3 MB." in text) != charts
    assert sizes[0] > 300_000


def test_published_figures_and_speed_stand_beside_ours(board: Drawn, text: str) -> None:
    ours = board.cells[(board.cells["protocol"] == "standard") & (board.cells["method"] == "ties")]
    scores = ours.set_index("task")["normalized"]
    shown = [scores["cola"], scores["sst2"], (scores["cola"] + scores["sst2"]) / 2]
    cells = "".join(f'<td class="number">{score:.1f}</td>' for score in shown)
    assert f'<th scope="row">here, ties</th>{cells}</tr>' in text
    speed = "".join(f'<td class="number">{one}</td>' for one in ("116.6", "0.623 x"))
    assert f'<th scope="row">soft</th>{speed}<td>plain</td>' in text


def test_what_is_not_there_is_left_out(board: Drawn) -> None:
    bare = dataclasses.replace(
        board,
        matrix=None,
        speed=None,
        published=[],
        comparisons=board.comparisons.iloc[:0],
        cells=board.cells.assign(samples=None, gain=np.nan, floor=np.nan),
        summary=board.summary.assign(gain=np.nan, gain_ci_low=np.nan, model_seconds_per_row=np.nan, tie_group=np.nan),
    )
    found = page(bare)
    assert 'id="matrix"' not in found
    for sentence in (
        "No method is ranked under this protocol.", "Nothing is ranked", "There is nothing to compare.",
        "No method here has a router whose weights were kept.", "The model's time is not shown",
    ):  # fmt: skip
        assert sentence in found
    assert json.loads(script(found, "rows")) == {"tasks": {}, "cells": []}


def test_a_method_of_the_leading_group_is_not_called_worse_than_its_best(board: Drawn) -> None:
    against = board.comparisons["reason"] == "best"
    found = dataclasses.replace(board, comparisons=board.comparisons.assign(p_holm=0.01, sure=~against))
    shown = {one["reason"]: {row[3] for row in one["table"]} for one in differences(found, "standard")}
    assert shown == {REASONS["best"]: {"can't be told apart"}, REASONS["constant"]: {"better", "worse"}}
    assert "verdict against the best is that of the tie groups" in page(found)


def test_a_protocol_that_tells_the_model_the_task_is_said_to(board: Drawn, tmp_path: Path) -> None:
    told = "chooses the router on the rows that are scored"
    alone = drawn_board(tmp_path, methods=3, tasks=2, protocols=1, rows=20)
    for protocol, times in (("standard", 0), ("paper", 1)):
        frames = ("cells", "tasks", "summary", "comparisons")
        only: Any = {name: getattr(alone, name).assign(protocol=protocol, samples=None) for name in frames}
        found = dataclasses.replace(alone, **only)
        written = io.StringIO()
        print_leaderboard(found, Console(file=written, width=500))
        answers, _, _ = page(found).partition('aria-labelledby="ranking"')
        assert [text.count(told) for text in (written.getvalue(), markdown(found), answers)] == 3 * [times]


def test_the_page_names_tasks_without_a_gain_and_unpaired_ones(board: Drawn) -> None:
    tasks = board.tasks.assign(
        floor=[math.nan if task == "cola" else 50.0 for task in board.tasks["task"]],
        paired=[task not in ("sst2", "mrpc") for task in board.tasks["task"]],
        chance=[41.7 if task == "qqp" else math.nan for task in board.tasks["task"]],
    )
    found = page(dataclasses.replace(board, tasks=tasks))
    assert found.count("Not in the mean of gains, because no constant answer has a score: cola.") == 2  # two protocols
    assert found.count("Not on the same rows, but each with draws of its own: sst2, mrpc.") == 2
    assert '<td class="number">41.7</td>' in found
    assert "best constant" not in found
    assert "the most frequent training label, or the mean of the training rows' numbers" in html.unescape(found)


@pytest.mark.versions
def test_charts_are_drawn_with_the_page_s_colours(text: str) -> None:
    drawn: list[Any] = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) > 20
    assert all("var(--ink)" in one and "var(--line)" in one for one in drawn)
    assert not re.search(r'(fill|stroke)="#', "".join(drawn))
    assert not re.search(r"\bid=", "".join(drawn))  # ids of several charts would clash
    assert not re.search(r"url\(|href=|<script|<image", "".join(drawn))
