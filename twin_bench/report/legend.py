"""What a reader must know about the figures of a table: rows, metrics, seed, versions, floors, routers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twin_bench.report.numbers import known
from twin_bench.report.words import CONSTANT, seeds
from twin_bench.results.board import Leaderboard

FIGURES = (
    "Normalized is the mean over tasks of 100 x score / the expert's score on that task, under the same protocol. Gain "
    "is the mean of 100 x (score - floor) / (expert - floor), where the floor is what a constant answer scores: "
    f"{CONSTANT}. Another constant may score more where the metric is not the accuracy. A rank's range holds all ranks "
    "that the rows allow. Scores on tasks are in points, or in the metric's own unit where it is no fraction; ± is one "
    "standard error. Speed as a fair ratio is measured by twin-bench bench, not here."
)
PAIRED = (
    "All intervals are 95%. Those of means and differences are made of draws of the rows: in each draw the same rows "
    "serve every method, the experts and the floor"
)


def legend(board: Leaderboard) -> list[str]:
    """Return paragraphs of plain text: what the figures are, then what is said of rows, routers and other methods."""
    cells = board.cells.to_dict("records")
    paragraphs = [
        FIGURES,
        _intervals(board),
        *_directions(cells),
        _rows_scored(board, cells),
        *_floors(board),
        *_tasks_left_out(cells),
        *_seeds(cells),
    ]
    for (protocol, method), own in _grouped(cells).items():
        notes = own[0]["notes"]
        paragraphs += [
            f"{method} ({protocol}): {sentence(notes[note])}." for note, sentence in _NOTES.items() if notes.get(note)
        ]
        paragraphs += [
            f"{method} ({protocol}): scored without an answer on {row['task']}: {row['notes']['set_aside']}."
            for row in own
            if row["notes"].get("set_aside")
        ]
    return [*paragraphs, *board.remarks]


def _intervals(board: Leaderboard) -> str:
    """Return what intervals are made of, and on which tasks methods are not compared on the same draws."""
    tasks = _tasks(board, lambda line: not line["paired"])
    if not tasks:
        return f"{PAIRED}."
    return f"{PAIRED}, but on {tasks}, where each method has draws of its own: the score can't be made of kept rows."


def _directions(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what must be said of tasks that are nobody's, and of scores of which less is better."""
    nobodys = sorted({cell["task"] for cell in cells if cell["expert"] is None})
    turned = sorted({f"{cell['task']} ({cell['metric']})" for cell in cells if not cell["higher_is_better"]})
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


def _rows_scored(board: Leaderboard, cells: Sequence[Mapping[str, Any]]) -> str:
    counts: dict[str, set[int]] = {}
    versions: dict[str, set[str]] = {}
    for cell in cells:
        counts.setdefault(f"{cell['task']} ({cell['metric']})", set()).add(cell["n"])
        for package, version in cell["versions"].items():
            versions.setdefault(package, set()).add(version)
    scored = ", ".join(f"{task} {'/'.join(map(str, sorted(n)))}" for task, n in counts.items())
    listed = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in versions.items())
    return f"Rows scored: {scored}. {seeds(board.identity).capitalize()}. Versions: {listed}."


def _floors(board: Leaderboard) -> list[str]:
    """Return what constant answers and guesses score, and which tasks have no gain."""
    said = [
        f"{name}: {levels}."
        for name, levels in (
            ("Floors (the constant answer)", _levels(board, "floor")),
            ("Chance (one over the number of labels or options, mean of the rows scored)", _levels(board, "chance")),
        )
        if levels
    ]
    below = _tasks(board, lambda line: line["floor"] < line["chance"])
    if below:
        said.append(f"The floor is below chance on {below}: what is better there may still be a guess.")
    weak = _tasks(board, lambda line: line["weak"])
    if weak:
        said.append(
            "The expert is not above its floor by two standard errors, so the task has no gain. The task is in the "
            f"normalized mean and so in the ranks, which it may make wide, but is not in the mean of gains: {weak}."
        )
    floorless = _tasks(board, lambda line: isinstance(line["expert"], str) and not known(line["floor"]))
    if floorless:
        said.append(f"No floor is known, so the task has no gain and is not in the mean of gains: {floorless}.")
    return said


def _levels(board: Leaderboard, column: str) -> str:
    """Return what is known in a column of the board's tasks as text, each protocol's where they differ."""
    levels: dict[str, dict[str, list[str]]] = {}
    for line in board.tasks.to_dict("records"):
        if known(line[column]):
            levels.setdefault(line["task"], {}).setdefault(f"{line[column]:.2f}", []).append(line["protocol"])
    return ", ".join(
        f"{task} {level}" if len(own) == 1 else f"{task} {level} ({', '.join(protocols)})"
        for task, own in levels.items()
        for level, protocols in own.items()
    )


def _tasks(board: Leaderboard, chosen: Callable[[Mapping[str, Any]], bool]) -> str:
    """Return the chosen lines of the board's tasks as text."""
    return ", ".join(f"{one['task']} ({one['protocol']})" for one in board.tasks.to_dict("records") if chosen(one))


def _tasks_left_out(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    tasks = sorted(
        {f"{cell['task']} ({cell['protocol']})" for cell in cells if cell["expert"] and cell["normalized"] is None}
    )
    if not tasks:
        return []
    reason = "because the expert's score is not above 0, or a score is 0 where less is better"
    return [f"Not in the normalized mean, {reason}: {', '.join(tasks)}."]


def _seeds(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which methods' scores are means over seeds, with the spread of each task's score."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell["seeds"] > 1:
            spread = f"{cell['task']} {cell['seed_spread']:.2f}"
            found.setdefault(f"{cell['method']} ({cell['protocol']}, {cell['seeds']} seeds)", []).append(spread)
    return [f"{label}: mean over the seeds; standard deviation: {', '.join(own)}." for label, own in found.items()]


def _adapted(note: Mapping[str, Any]) -> str:
    return f"learned on {note['inputs']}, the same rows that it is scored on: {_row_counts(note)}"


def _routed(note: Mapping[str, Any]) -> str:
    accuracy = ", ".join(f"{task} {value:.2f}" for task, value in note["task_accuracy"].items())
    rows = "there"
    if note.get("report_rows"):  # cells of older formats have no rows apart
        rows = f"on {note['reported_on']} ({note['report_rows']})"
    return (
        f"router on layer {note['layer']}, chosen on {note['selected_on']} ({note['selection_rows']}), "
        f"task-id accuracy {rows} {note['accuracy']:.3f}: {accuracy}"
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


def _grouped(cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["protocol"], cell["method"]), []).append(cell)
    return groups
