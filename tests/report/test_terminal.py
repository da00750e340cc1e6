"""The table in a terminal: it keeps to the width, names what it leaves out, and cuts no cell."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from tests.support.board import Drawn, drawn_board
from twin_bench.report.tables import table
from twin_bench.report.terminal import print_leaderboard


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return drawn_board(tmp_path_factory.mktemp("board"), methods=8, tasks=5, protocols=1, rows=40)


def printed(board: Drawn, width: int, *, wide: bool = False) -> list[str]:
    written = io.StringIO()
    print_leaderboard(board, Console(file=written, width=width), wide=wide)
    return written.getvalue().splitlines()


def head_of(lines: list[str]) -> tuple[int, list[str]]:
    """Return the place of the table's first line, and its columns."""
    (place,) = (place for place, line in enumerate(lines) if line.startswith("method "))
    return place, lines[place].split()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_keeps_to_the_width_and_names_what_it_leaves_out(board: Drawn, width: int) -> None:
    lines = printed(board, width)
    assert max(map(len, lines)) <= width
    place, shown = head_of(lines)
    assert shown[:3] == ["method", "rank", "group"] or shown[:2] == ["method", "rank"]
    assert "normalized" in shown
    everything = list(table(board, "standard").columns)
    said = re.search(r"--wide also shows: (.*?)\n\n", "\n".join(lines), re.DOTALL)
    assert said is not None
    left_out = said[1].replace("\n", " ").split(", ")
    assert sorted(shown + left_out) == sorted(everything)
    for line, method in zip(lines[place + 1 :], table(board, "standard")["method"], strict=False):
        assert line.startswith(f"{method} ")
    assert "…" not in "".join(lines)


def test_wide_shows_all_columns_and_cuts_no_cell(board: Drawn) -> None:
    lines = printed(board, 80, wide=True)
    place, shown = head_of(lines)
    assert shown == list(table(board, "standard").columns)
    assert not [line for line in lines if line.startswith("--wide")]
    whole = table(board, "standard")
    for line, cells in zip(lines[place + 1 :], whole.itertuples(index=False), strict=False):
        expected = [text.partition(" ±")[0] for text in cells if text]
        assert re.split(r" {2,}", line.strip()) == expected
    assert len(lines[place + 1]) > 80


def test_a_wider_terminal_shows_more(board: Drawn) -> None:
    counts = [len(head_of(printed(board, width))[1]) for width in (40, 80, 120, 300)]
    assert counts == sorted(set(counts))
    assert counts[0] == 3
