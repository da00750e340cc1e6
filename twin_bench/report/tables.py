"""A protocol's table as text, for the terminal, Markdown and LaTeX: the ranking first, then tasks, then costs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from twin_bench.report.answer import ordered
from twin_bench.report.numbers import MISSING, group, interval, known, ranks, size, times
from twin_bench.results.board import Leaderboard


def table(board: Leaderboard, protocol: str) -> pd.DataFrame:
    """Return a protocol's table as text: bounds first, then the methods by rank, then chance if it is known.

    Columns: method, rank, group, normalized, gain and, if a task is nobody's, retention with intervals, each task's
    score with its standard error, track, storage and build time.
    """
    cells = board.cells[board.cells["protocol"] == protocol]
    tasks = list(dict.fromkeys(cells["task"]))
    scores = {(cell["method"], cell["task"]): cell for cell in cells.to_dict("records")}
    retained = board.summary.loc[board.summary["protocol"] == protocol, "retention"].notna().any()
    lines: list[dict[str, str]] = []
    for line in in_order(board, protocol).to_dict("records"):
        own = {task: _score(scores.get((line["method"], task))) for task in tasks}
        lines.append(
            {
                "method": line["method"],
                "rank": ranks(line["rank_low"], line["rank_high"]) if known(line["rank_low"]) else "",
                "group": group(line["tie_group"], told=bool(line["told_the_task"])),
                "normalized": interval(line["normalized"], line["ci_low"], line["ci_high"]),
                "gain": interval(line["gain"], line["gain_ci_low"], line["gain_ci_high"]),
                **({"retention": _retention(line)} if retained else {}),
                **own,
                "track": line["track"],
                "storage": times(line["relative_storage"]),
                "kept": size(line["stored_bytes"]),
                "build": _seconds(line["build_seconds"]),
            }
        )
    chances = board.tasks[(board.tasks["protocol"] == protocol) & board.tasks["chance"].notna()]
    if len(chances):
        lines.append({"method": "chance", **{c["task"]: f"{c['chance']:.2f}" for c in chances.to_dict("records")}})
    return pd.DataFrame(lines).fillna("")


def in_order(board: Leaderboard, protocol: str) -> pd.DataFrame:
    """Return a protocol's lines of the summary: the bounds, the ranked methods, those told the task, the rest."""
    lines = ordered(board, protocol)
    bound = lines["bound"].astype(bool)
    return pd.concat([lines[bound], lines[~bound]])


def _retention(line: dict[str, Any]) -> str:
    return interval(line["retention"], line["retention_ci_low"], line["retention_ci_high"])


def _score(cell: dict[str, Any] | None) -> str:
    """Return a score as text, with its standard error where that is known."""
    if cell is None:
        return ""
    return f"{cell['score']:.2f}" if cell["stderr"] is None else f"{cell['score']:.2f} ±{cell['stderr']:.2f}"


def _seconds(seconds: float | None) -> str:
    return f"{seconds:.0f} s" if known(seconds) else MISSING
