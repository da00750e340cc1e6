"""A board's tables, to compare runs with."""

from __future__ import annotations

import json
from pathlib import Path

from twin_bench.results.cells import Board
from twin_bench.results.stored import load_leaderboard, write_board

MEASURED = ("measured", "seconds", "build_seconds", "build_peak_bytes", "model_seconds", "model_seconds_per_row")
"""What is another figure in each run: times and memory."""


def figures(board: Board, out: Path) -> dict[str, str]:
    """Return a board's tables as text with all digits, without what is measured. The board is written to `out`."""
    write_board(board, out)
    found = load_leaderboard(out, draws=200)
    tables = {name: getattr(found, name) for name in ("cells", "summary", "comparisons", "matrix")}
    shown = {
        name: table.drop(columns=[*MEASURED], errors="ignore").to_csv(index=False)
        for name, table in tables.items()
        if table is not None
    }
    return {**shown, "skipped": json.dumps(list(found.skipped)), "remarks": "\n".join(found.remarks)}
