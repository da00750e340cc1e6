"""A directory's board on disk: written by a run, and read again without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd

from twin_bench.errors import InputError
from twin_bench.files import read_json, read_record, write_record
from twin_bench.results.analysis import DRAWS, cell_lines, scored_cells, task_lines
from twin_bench.results.board import Leaderboard
from twin_bench.results.cells import Board, Cell, Skipped
from twin_bench.results.published import like_ours, paragraph
from twin_bench.results.summary import comparisons_frame, lines_of, ranks_of, summary_frame

FILE = "board.json"
SPEED = "speed.json"
FORMAT = 1
"""The format of board.json."""


def write_board(board: Board, out: Path) -> None:
    """Write a board to `out`, atomically: which cells it has, what was skipped, and what was compared."""
    content = {
        "cells": [asdict(cell) for cell in board.cells],
        "matrix": [asdict(cell) for cell in board.matrix],
        "skipped": [asdict(method) for method in board.skipped],
        "left_out": list(board.left_out),
        "identity": dict(board.identity),
        "methods": {label: dict(header) for label, header in board.methods.items()},
    }
    write_record(out / FILE, content, format_number=FORMAT)


def read_board(out: Path) -> Board:
    """Read the board of a directory. InputError if there is none, or one of another version."""
    stored = read_record(out / FILE, format_number=FORMAT)
    names = {field.name for field in fields(Cell)}
    if stored is None or any(cell.keys() != names for cell in [*stored["cells"], *stored["matrix"]]):
        raise InputError(
            f"{out}: no results of this version of twin-bench (no {FILE} that it can read); run twin-bench leaderboard "
            f"--out {out}"
        )
    return Board(
        cells=[Cell(**cell) for cell in stored["cells"]],
        skipped=[Skipped(**method) for method in stored["skipped"]],
        left_out=stored["left_out"],
        identity=stored["identity"],
        methods=stored["methods"],
        matrix=[Cell(**cell) for cell in stored["matrix"]],
    )


def load_leaderboard(out: str | os.PathLike[str], *, compare_to: str | None = None, draws: int = DRAWS) -> Leaderboard:
    """Return what a directory of results holds as data frames, with intervals, ranks and comparisons.

    Args:
        out: the directory that `twin-bench leaderboard` wrote.
        compare_to: the label of a row that every method is compared with.
        draws: how many times the rows are drawn.

    Raises:
        InputError: no results are there, samples are missing or damaged, or no row is labelled `compare_to`.
    """
    directory = Path(out)
    return analysed(read_board(directory), directory, compare_to=compare_to, draws=draws)


def analysed(board: Board, directory: Path, *, compare_to: str | None = None, draws: int = DRAWS) -> Leaderboard:
    """Return a board's data frames. The samples are read from `directory`."""
    scored = scored_cells(board.cells, directory, draws)
    tasks = _with_chance(task_lines(scored), board.identity.get("tasks", {}))
    lines = lines_of(scored, tasks)
    ranks = ranks_of(lines)
    comparisons = comparisons_frame(lines, ranks, compare_to)
    cells = cell_lines(scored, tasks)
    identity = {**board.identity, "tasks": _with_rows(board.identity.get("tasks", {}), tasks)}
    published = like_ours(cells.to_dict("records"))
    if compare_to is not None and "reference" not in set(comparisons["reason"]):
        missing = [f"No method is compared with {compare_to}: it lacks a task, or no task has an expert."]
    else:
        missing = []
    skipped = [
        f"{'Failed' if one.failed else 'Skipped'}: {one.method} ({one.protocol}): {one.reason}."
        for one in board.skipped
    ]
    return Leaderboard(
        directory=directory,
        identity=identity,
        methods=board.methods,
        remarks=[*missing, *skipped, *board.left_out, *map(paragraph, published)],
        skipped=[asdict(one) for one in board.skipped],
        published=[figure.model_dump() for figure in published],
        cells=cells,
        tasks=tasks,
        summary=summary_frame(lines, ranks),
        comparisons=comparisons,
        matrix=_matrix(board, directory, draws),
        speed=read_json(directory / SPEED) if (directory / SPEED).is_file() else None,
    )


def _with_chance(tasks: pd.DataFrame, described: Mapping[str, Any]) -> pd.DataFrame:
    """Return the tasks with the chance level of those whose cells do not say it, where the task does."""
    known = tasks["task"].map({name: one.get("chance") for name, one in described.items()})
    return tasks.assign(chance=tasks["chance"].fillna(known.astype(float)))


def _with_rows(described: Mapping[str, Any], tasks: pd.DataFrame) -> dict[str, Any]:
    rows = dict(zip(tasks["task"], tasks["rows"], strict=True))
    return {name: {**one, "rows": int(rows[name])} for name, one in described.items() if name in rows}


def _matrix(board: Board, directory: Path, draws: int) -> pd.DataFrame | None:
    """Return every expert's score on every task, or None if it was not asked for."""
    if not board.matrix:
        return None
    scored = scored_cells(board.matrix, directory, draws)
    return pd.DataFrame(
        [
            {
                "expert": one.first.settings["expert"],
                "task": one.first.task,
                "score": one.score,
                "ci_low": one.low,
                "ci_high": one.high,
            }
            for one in scored.values()
        ]
    )
