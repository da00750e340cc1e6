"""The files of a report: written from a leaderboard's data frames, each atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from twin_bench.files import write_text
from twin_bench.report.latex import latex
from twin_bench.report.markdown import markdown
from twin_bench.report.page import page
from twin_bench.results.board import Leaderboard

FILES = (
    "leaderboard.json",
    "leaderboard.csv",
    "leaderboard.md",
    "leaderboard.tex",
    "summary.json",
    "comparisons.json",
    "skipped.json",
    "index.html",
)
"""What is written, in this order."""
COLUMNS = ("suite", "protocol", "method", "track", "task", "metric", "score", "normalized", "stderr", "n", "seed")
CSV_COLUMNS = (*COLUMNS, "expert", "retention", "ci_low", "ci_high", "gain", "floor", "seeds")


def write_report(board: Leaderboard, out: Path) -> None:
    """Write the FILES to `out`."""
    cells = board.cells
    ordered = cells[[*COLUMNS, *(column for column in cells.columns if column not in COLUMNS)]]
    contents = (
        _json(ordered.to_dict("records")),
        cells[list(CSV_COLUMNS)].map(_unsigned).to_csv(index=False),
        markdown(board),
        latex(board),
        _json(board.summary.to_dict("records")),
        _json(board.comparisons.to_dict("records")),
        _json(board.skipped),
        page(board),
    )
    for name, content in zip(FILES, contents, strict=True):
        write_text(out / name, content)


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numpy's numbers as Python's, no NaN and no -0.0."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NaT or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return _unsigned(value)


def _unsigned(value: Any) -> Any:
    """Return a value, and 0.0 for -0.0."""
    return value + 0.0 if isinstance(value, float) else value
