"""Cells as a run leaves them, made without a model: alone, or as a directory of results with their samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from twin_bench.data.metrics import find_metric
from twin_bench.results.cells import Board, Cell, Cells
from twin_bench.results.samples import Samples
from twin_bench.results.stored import write_board

BOUNDS = ("pretrained", "experts", "constant", "lead_3", "one_expert.cola")
Scored = tuple[Cell, Samples | None]
"""A cell and the rows that it is made of, None where its harness gives none."""


def made_cell(method: str = "experts", task: str = "cola", score: float = 50.0, **changes: Any) -> Cell:
    """Return a cell of an accuracy on 900 rows, without samples. `changes` are fields with other values."""
    fields = {
        "suite": "made",
        "protocol": "standard",
        "method": method,
        "track": "bound" if method in BOUNDS else "data-free",
        "task": task,
        "expert": task,
        "metric": "acc",
        "higher_is_better": True,
        "percent": True,
        "score": score,
        "stderr": 1.0,
        "n": 900,
        "seed": 0,
        "seconds": 2.0,
        "model_seconds": 0.9,
        "build_seconds": 1.0,
        "build_peak_bytes": 1000,
        "parameters": 5,
        "stored_bytes": 20,
        "relative_storage": 1.0,
        "settings": {},
        "notes": {},
        "device": "cpu",
        "measured": "2026-01-01T00:00:00+00:00",
        "versions": {"torch": "2.9.0"},
        "samples": None,
        **changes,
    }
    key = "-".join(map(str, (fields["protocol"], method, task, fields["seed"])))
    return Cell(**{"key": key, **fields})


def answered(method: str, task: str, targets: Sequence[Any], predictions: Sequence[Any], **changes: Any) -> Scored:
    """Return a cell of a metric of labels or numbers, and its samples.

    Of `changes`, `identities`, `clusters`, `texts` and `weights` belong to the samples, and the others to the cell.
    """
    own = {name: changes.pop(name) for name in ("identities", "clusters", "texts", "weights") if name in changes}
    metric = find_metric(changes.get("metric", "acc"))
    scores = [float(p == t) for p, t in zip(predictions, targets, strict=True)]
    if metric.answers == "number":
        scores = [float((p - t) ** 2) for p, t in zip(predictions, targets, strict=True)]
    identities = own.pop("identities", [f"{task}{row}" for row in range(len(targets))])
    samples = Samples(identities, list(predictions), list(targets), scores, "metric", **own)
    unit = 100 if metric.percent else 1
    fields = {
        "score": unit * samples.score(metric.name),
        "stderr": unit * samples.standard_error(metric.name),
        "n": len(targets),
        "metric": metric.name,
        "percent": metric.percent,
        "higher_is_better": metric.higher_is_better,
    }
    return made_cell(method, task, **{**fields, **changes}), samples


def board_of(cells: Sequence[Cell], *, matrix: Sequence[Cell] = (), **identity: Any) -> Board:
    """Return cells as a run's board. `identity` are what it says of itself in place of what is made up."""
    first = {cell.method: cell for cell in reversed(cells)}
    methods = {method: _header(first[method]) for method in dict.fromkeys(cell.method for cell in cells)}
    return Board(cells, identity={**_identity(cells), **identity}, methods=methods, matrix=matrix)


def write_made(scored: Iterable[Scored], out: Path, *, matrix: Iterable[Scored] = (), **identity: Any) -> Board:
    """Write cells with their samples to `out` as a run does, and the board of them. Return the board."""
    cells, own = ([Cells(out).write(*one) for one in part] for part in (scored, matrix))
    board = board_of(cells, matrix=own, **identity)
    write_board(board, out)
    return board


def _identity(cells: Sequence[Cell]) -> dict[str, Any]:
    tasks = {
        cell.task: {
            "expert": cell.expert,
            "metric": cell.metric,
            "percent": cell.percent,
            "data": "rows",
            "split": "validation",
            "synthetic": False,
        }
        for cell in cells
    }
    return {
        "suite": cells[0].suite,
        "base_model": "a/model",
        "experts": {cell.expert: f"experts/{cell.expert}" for cell in cells if cell.expert},
        "tasks": tasks,
        "seed": 0,
        "seeds": 1,
        "protocols": list(dict.fromkeys(cell.protocol for cell in cells)),
        "harness": "lm-eval",
        "date": "2026-01-01T00:00:00+00:00",
        "command": "twin-bench leaderboard --suite made",
        "versions": {"torch": "2.9.0"},
        "device": "cpu",
        "machine": "2 CPU cores, x86_64, Linux",
        "commit": None,
    }


def _header(cell: Cell) -> dict[str, Any]:
    return {
        "method": cell.method,
        "title": cell.method,
        "paper": "",
        "track": cell.track,
        "summary": "A formula.",
        "needs": [],
        "options": {},
        "bound": cell.track == "bound",
        "told_the_task": cell.track == "task-id given",
        "draws": False,
    }
