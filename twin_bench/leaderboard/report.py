"""From cells to a leaderboard: normalised scores, and the table as JSON, CSV, Markdown, HTML and terminal output."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twin_bench.files import write_text
from twin_bench.results.cells import Board, Cell
from twin_bench.results.published import like_ours

COLUMNS = ("suite", "protocol", "method", "track", "task", "metric", "score", "normalized", "stderr", "n", "seed")
CSV_COLUMNS = (*COLUMNS, "expert", "retention")
FILES = ("leaderboard.json", "leaderboard.csv", "leaderboard.md", "index.html", "skipped.json")
"""What is written, in this order."""


def leaderboard_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return one row for each cell, with its normalised score or its retention.

    normalized = 100 * score / the score of the task's expert under the same protocol (the paper's equation 4). It is
    None if the expert's score is not above 0, and for a task that is nobody's. Such a task has retention = 100 * score
    / the score of the base model, which is None for all other tasks. Where less is better, both are turned round: 100 *
    the reference's score / score, and None for all methods where one scores 0. Negative values are kept.
    """
    references = {
        (cell.protocol, cell.task): cell.score
        for cell in cells
        if cell.method == ("pretrained" if cell.expert is None else "experts")
    }
    perfect = {(cell.protocol, cell.task) for cell in cells if not cell.higher_is_better and cell.score <= 0}
    rows = []
    for cell in cells:
        place = cell.protocol, cell.task
        relative = None if place in perfect else _relative(cell, references.get(place))
        fields = asdict(cell)
        own = {"normalized": None if cell.expert is None else relative}
        first = {column: own[column] if column in own else fields.pop(column) for column in COLUMNS}
        rows.append({**first, **fields, "retention": relative if cell.expert is None else None})
    return rows


def _relative(cell: Cell, reference: float | None) -> float | None:
    """Return 100 * score / reference, or its inverse where less is better; None unless the reference is above 0."""
    if reference is None or reference <= 0:
        return None
    return 100 * cell.score / reference if cell.higher_is_better else 100 * reference / cell.score


def summary(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return one line for each protocol and method: mean normalised score, standard error, each task's score, costs.

    The mean is over the tasks whose expert scores above 0. They are the same for every method of a protocol. The
    standard error treats tasks as independent and the experts' scores as exact. It measures the contribution of the
    rows drawn for this method. It is not the error of a difference between two methods on the same rows. It is NaN if
    a score's error is not known. `retention` is the mean over the tasks that are nobody's, and NaN without any.
    """
    experts = {(row["protocol"], row["task"]): row["score"] for row in rows if row["method"] == "experts"}
    lines = []
    for (protocol, method), own in _grouped(rows).items():
        usable = [row for row in own if row["normalized"] is not None]
        retained = [row["retention"] for row in own if row["retention"] is not None]
        errors = [_relative_error(row, experts[protocol, row["task"]]) for row in usable]
        lines.append(
            {
                "protocol": protocol,
                "method": method,
                "track": own[0]["track"],
                "normalized": sum(row["normalized"] for row in usable) / len(usable) if usable else math.nan,
                "stderr": math.sqrt(sum(error * error for error in errors)) / len(usable) if usable else math.nan,
                "retention": sum(retained) / len(retained) if retained else math.nan,
                **{row["task"]: row["score"] for row in own},
                "parameters": own[0]["parameters"],
                "build_seconds": own[0]["build_seconds"],
            }
        )
    return pd.DataFrame(lines)


def _relative_error(row: Mapping[str, Any], reference: float) -> float:
    """Return the standard error of a row's normalised score, with the reference as exact; NaN if it is not known."""
    if row["stderr"] is None:
        return math.nan
    slope = 100 / reference if row["higher_is_better"] else row["normalized"] / row["score"]
    return float(slope * row["stderr"])


def write_leaderboard(board: Board, out: Path) -> pd.DataFrame:
    """Write the FILES to `out`, each atomically; return the summary."""
    rows = leaderboard_rows(board.cells)
    table, said = summary(rows), asides(board)
    contents = (
        json.dumps(rows, indent=1) + "\n",
        pd.DataFrame(rows)[list(CSV_COLUMNS)].to_csv(index=False),
        markdown(rows, table, said),
        page(rows, table, said),
        json.dumps([asdict(method) for method in board.skipped], indent=1) + "\n",
    )
    for name, content in zip(FILES, contents, strict=True):
        write_text(out / name, content)
    return table


def asides(board: Board) -> list[str]:
    """Return a paragraph for each method that was skipped, each thing left out, and each published figure beside it."""
    skipped = [f"Skipped: {method.method} ({method.protocol}): {method.reason}." for method in board.skipped]
    return [*skipped, *board.left_out, *like_ours([asdict(cell) for cell in board.cells])]


def markdown(rows: Sequence[dict[str, Any]], table: pd.DataFrame, said: Sequence[str] = ()) -> str:
    """Return the leaderboard as Markdown, with a section for each protocol and a legend that ends with `said`."""
    sections = [f"# {rows[0]['suite']}\n"]
    for protocol, part in table.groupby("protocol", sort=False):
        shown = _shown(rows, part, str(protocol))
        lines = ["| " + " | ".join(shown.columns) + " |", "|" + " --- |" * len(shown.columns)]
        lines += ["| " + " | ".join(map(str, line)) + " |" for line in shown.itertuples(index=False)]
        sections.append(f"## Protocol: {protocol}\n\n" + "\n".join(lines) + "\n")
    escaped = [html.escape(paragraph, quote=False) for paragraph in said]
    return "\n".join([*sections, legend(rows, escaped)])


def legend(rows: Sequence[dict[str, Any]], said: Sequence[str] = ()) -> str:
    """Return what a reader must know about the figures: rows, metrics, seed, versions, routers; then `said`."""
    paragraphs = [_FIGURES, *_directions(rows), _rows_scored(rows), *_chance_levels(rows), *_tasks_left_out(rows)]
    for (protocol, method), own in _grouped(rows).items():
        notes = own[0]["notes"]
        paragraphs += [
            f"{method} ({protocol}): {sentence(notes[note])}." for note, sentence in _NOTES.items() if notes.get(note)
        ]
        paragraphs += [
            f"{method} ({protocol}): scored without an answer on {row['task']}: {row['notes']['set_aside']}."
            for row in own
            if row["notes"].get("set_aside")
        ]
    return "\n\n".join([*paragraphs, *said]) + "\n"


_FIGURES = (
    "Scores are in points, ± one standard error. Normalized is the mean over tasks of 100 x score / the expert's score "
    "on that task, under the same protocol. Its error treats tasks as independent and the experts' scores as exact. "
    "Speed is measured by twin-bench bench, not here."
)


def _directions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what must be said of tasks that are nobody's, and of scores of which less is better."""
    nobodys = sorted({row["task"] for row in rows if row["expert"] is None})
    turned = sorted({f"{row['task']} ({row['metric']})" for row in rows if not row["higher_is_better"]})
    said = []
    if nobodys:
        said.append(
            f"No expert was trained for {', '.join(nobodys)}. Retention is the mean over them of 100 x score / the "
            "base model's score. They are not in the normalized mean."
        )
    if turned:
        said.append(
            f"Less is better on {', '.join(turned)}: normalized and retention are turned round there, 100 x the "
            "reference's score / score."
        )
    return said


def _rows_scored(rows: Sequence[dict[str, Any]]) -> str:
    counts: dict[str, set[int]] = {}
    for row in rows:
        counts.setdefault(f"{row['task']} ({row['metric']})", set()).add(row["n"])
    scored = ", ".join(f"{task} {'/'.join(map(str, sorted(n)))}" for task, n in counts.items())
    known: dict[str, set[str]] = {}
    for row in rows:
        for package, version in row["versions"].items():
            known.setdefault(package, set()).add(version)
    versions = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in known.items())
    return f"Rows scored: {scored}. Seed {rows[0]['seed']}. Versions: {versions}."


def _chance_levels(rows: Sequence[dict[str, Any]]) -> list[str]:
    chances = {row["task"]: row["notes"]["chance"] for row in rows if "chance" in row["notes"]}
    if not chances:
        return []
    levels = ", ".join(f"{task} {level:.2f}" for task, level in chances.items())
    return [f"Chance (one over the number of options, mean of the rows scored): {levels}."]


def _tasks_left_out(rows: Sequence[dict[str, Any]]) -> list[str]:
    tasks = sorted(
        {f"{row['task']} ({row['protocol']})" for row in rows if row["expert"] and row["normalized"] is None}
    )
    if not tasks:
        return []
    reason = "because the expert's score is not above 0, or a score is 0 where less is better"
    return [f"Not in the normalized mean, {reason}: {', '.join(tasks)}."]


def _adapted(note: Mapping[str, Any]) -> str:
    return f"learned on {note['inputs']}, the same rows that it is scored on: {_row_counts(note)}"


def _routed(note: Mapping[str, Any]) -> str:
    accuracy = ", ".join(f"{task} {value:.2f}" for task, value in note["task_accuracy"].items())
    return (
        f"router on layer {note['layer']}, chosen on {note['selected_on']} ({note['selection_rows']}), "
        f"task-id accuracy there {note['accuracy']:.3f}: {accuracy}"
    )


def _tuned(note: Mapping[str, Any]) -> str:
    options = ", ".join(f"{option} {value} of {note['grid'][option]}" for option, value in note["chosen"].items())
    return f"{options}, chosen on {note['chosen_on']}: {_row_counts(note)}"


def _calibrated(note: Mapping[str, Any]) -> str:
    return f"{note['statistics']} statistics of training rows: {_row_counts(note)}"


def _row_counts(note: Mapping[str, Any]) -> str:
    return ", ".join(f"{task} {count}" for task, count in note["rows"].items())


_NOTES = {"adapted_on": _adapted, "router": _routed, "tuned": _tuned, "calibration": _calibrated}
"""The notes of a cell that the legend shows, in this order, and the sentence of each."""


def page(rows: Sequence[dict[str, Any]], table: pd.DataFrame, said: Sequence[str] = ()) -> str:
    """Return the leaderboard as one self-contained HTML page."""
    body = [f"<h1>{html.escape(rows[0]['suite'])}</h1>"]
    for protocol, part in table.groupby("protocol", sort=False):
        body.append(f"<h2>Protocol: {protocol}</h2>")
        body.append(_shown(rows, part, str(protocol)).to_html(index=False, border=0))
    body += [f"<p>{html.escape(paragraph)}</p>" for paragraph in legend(rows, said).split("\n\n")]
    style = (
        "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .6em;text-align:right}td:first-child{text-align:left}"
    )
    title = html.escape(rows[0]["suite"])
    head = f'<meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def print_leaderboard(
    rows: Sequence[dict[str, Any]], table: pd.DataFrame, console: Console, said: Sequence[str] = ()
) -> None:
    """Print the leaderboard to a terminal. Scores have no errors there; the files have them."""
    for protocol, part in table.groupby("protocol", sort=False):
        shown = _shown(rows, part, str(protocol)).drop(columns=["track", "parameters", "build"])
        printed = Table(title=escape(f"{rows[0]['suite']}, protocol {protocol}"), box=None, pad_edge=False)
        for column in shown.columns:
            printed.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        for line in shown.itertuples(index=False):
            method, normalized, *scores = map(str, line)
            printed.add_row(escape(method), normalized, *(score.partition(" ±")[0] for score in scores))
        console.print(printed)
    console.print(legend(rows, said), highlight=False, markup=False)


def _shown(rows: Sequence[dict[str, Any]], part: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return a protocol's table as text."""
    errors = {(row["method"], row["task"]): row["stderr"] for row in rows if row["protocol"] == protocol}
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["protocol"] == protocol))
    shown = pd.DataFrame({"method": part["method"], "track": part["track"]})
    pairs = zip(part["normalized"], part["stderr"], strict=True)
    shown["normalized"] = [_with_error(mean, error) for mean, error in pairs]
    if part["retention"].notna().any():
        shown["retention"] = [_with_error(mean, None) for mean in part["retention"]]
    for task in tasks:
        scored = zip(part["method"], part[task], strict=True)
        shown[task] = [_with_error(score, errors.get((method, task))) for method, score in scored]
    shown["parameters"] = [f"{count / 1e6:.1f} M" for count in part["parameters"]]
    shown["build"] = ["n/a" if pd.isna(seconds) else f"{seconds:.0f} s" for seconds in part["build_seconds"]]
    chances = {row["task"]: f"{row['notes']['chance']:.2f}" for row in rows if "chance" in row["notes"]}
    if chances:  # one more line below the methods: the score of a random answer
        shown = pd.concat([shown, pd.DataFrame([{"method": "chance", **chances}])], ignore_index=True).fillna("")
    return shown


def _with_error(score: float, error: float | None) -> str:
    """Return a score as text, with its standard error where that is known."""
    if math.isnan(score):
        return "n/a"
    return f"{score:.2f}" if error is None or math.isnan(error) else f"{score:.2f} ±{error:.2f}"


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["protocol"], row["method"]), []).append(row)
    return groups
