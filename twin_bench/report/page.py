"""A leaderboard as a page: one HTML file that asks the network for nothing, under 3 MB."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from twin_bench.report import numbers, sections
from twin_bench.report.answer import answer, field
from twin_bench.report.legend import legend
from twin_bench.report.page_table import table
from twin_bench.report.routing import Routing
from twin_bench.report.words import CONSTANT, PROTOCOLS, TRACKS
from twin_bench.report.wrong_rows import LETTERS, ROWS, WrongRows
from twin_bench.results.board import Leaderboard

LIMIT = 3_000_000
"""A page is smaller than this, in bytes."""
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def page(board: Leaderboard) -> str:
    """Return the page of a leaderboard.

    It holds the rows that each cell got wrong, at most ROWS a cell, and as many fewer for every cell as it takes to
    stay below LIMIT. Where that is not enough, scores open nothing, and then there are no charts:
    the page says so. Texts of rows, labels and predictions are shown as they are and never read as markup.

    Raises:
        InputError: samples that the leaderboard names are damaged.
    """
    wrong, routings = _of_samples(board)
    templates = _templates()
    script = _source(templates, "page.js")
    found = table(board, wrong.places())
    context = _context(board, routings) | {
        "table": found,
        "style": Markup(_source(templates, "page.css")),
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "details": _json({"cells": found.details, "shared": found.shared}),
    }

    def rendered(shown: int, **left_out: Any) -> str:
        held = {"opens": True, "drawn": True, **context, "rows": _json(wrong.compact(shown)), **left_out}
        text = templates.get_template("page.html").render(**held, rows_shown=shown, rows_most=ROWS, letters=LETTERS)
        return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a row's text

    low, high = 0, ROWS
    text = rendered(high)
    if _bytes(text) < LIMIT:
        return text
    none = rendered(0)
    if _bytes(none) >= LIMIT:
        bare = {"opens": False, "details": _json({}), "rows": _json({})}
        none = rendered(0, **bare)
        return none if _bytes(none) < LIMIT else rendered(0, **bare, drawn=False)
    base = _bytes(none) - _bytes(_json(wrong.compact(0)))
    while low < high - 1:
        middle = (low + high) // 2
        fits = base + _bytes(_json(wrong.compact(middle))) < LIMIT - 1000
        low, high = (middle, high) if fits else (low, middle)
    return rendered(low)


def _of_samples(board: Leaderboard) -> tuple[WrongRows, dict[tuple[str, str], Routing]]:
    """Return the rows answered wrongly and the routers' choices, of the cells that have samples."""
    wrong, routings = WrongRows(), dict[tuple[str, str], Routing]()
    told = dict(zip(board.summary["method"], board.summary["told_the_task"].astype(bool), strict=True))
    cells = board.cells[board.cells["samples"].notna()]
    for (protocol, task), part in cells.groupby(["protocol", "task"], sort=False):
        frames = {method: board.rows(protocol, method, task) for method in part["method"]}
        best = {is_told: _best(board, protocol, is_told) for is_told in (False, True)}
        for cell in part.to_dict("records"):
            method, frame = cell["method"], frames[cell["method"]]
            candidates = [None if cell["track"] == "bound" else best[bool(told.get(method))], "experts"]
            reference = next((one for one in candidates if one in frames and one != method), None)
            others = (
                {}
                if reference is None
                else dict(zip(frames[reference]["identity"], frames[reference]["prediction"], strict=True))
            )
            wrong.add((protocol, method, task), frame, reference, others)
            if not told.get(method) and (routing := routings.get((protocol, method)) or Routing.of(frame)):
                routing.add(task, cell["expert"], frame)
                routings[protocol, method] = routing
    return wrong, routings


def _best(board: Leaderboard, protocol: str, told: bool) -> str | None:
    ranked = field(board, protocol, told=told)
    return None if ranked.empty else str(ranked.iloc[0]["method"])


def _context(board: Leaderboard, routings: dict[tuple[str, str], Routing]) -> dict[str, Any]:
    protocols = board.protocols
    tasks = board.identity["tasks"]
    synthetic = [task for task, one in tasks.items() if one.get("synthetic")]
    return {
        "board": board,
        "identity": board.identity,
        "tasks": _task_lines(board),
        "chances": bool(board.tasks["chance"].notna().any()),
        "synthetic": "all" if synthetic and len(synthetic) == len(tasks) else synthetic,
        "protocols": [
            {
                "name": protocol,
                "words": PROTOCOLS.get(protocol, ""),
                "answer": answer(board, protocol),
                "ranking": sections.ranking(board, protocol),
                "unranked": sections.unranked(board, protocol),
                "costs": sections.costs(board, protocol),
                "heat": sections.heat(board, protocol),
                "routers": sections.routers(routings, protocol),
                "differences": sections.differences(board, protocol),
                **_apart(board, protocol),
            }
            for protocol in protocols
        ],
        "score": sections.scored_by(board),
        "constant": CONSTANT,
        "legend": legend(board),
        "matrix": sections.matrix(board),
        "tracks": {track: TRACKS.get(track, "") for track in dict.fromkeys(board.summary["track"])},
        "methods": board.methods,
        "published": [_beside(board, figure) for figure in board.published],
    }


def _apart(board: Leaderboard, protocol: str) -> dict[str, list[str]]:
    """Return the tasks that are not in the mean of gains, and those whose methods are not scored in the same draws."""
    lines = board.tasks[board.tasks["protocol"] == protocol]
    floorless = lines["floor"].isna() & lines["expert"].notna()
    masks = {"weak": lines["weak"].astype(bool), "floorless": floorless, "unpaired": ~lines["paired"].astype(bool)}
    return {name: list(lines.loc[mask, "task"]) for name, mask in masks.items()}


def _task_lines(board: Leaderboard) -> list[dict[str, Any]]:
    """Return one line a task: what it is, its data, and the floor and the expert's score under the first protocol."""
    found = []
    percent = dict(zip(board.cells["task"], board.cells["percent"], strict=True))
    for task, part in board.tasks.groupby("task", sort=False):
        own, first = board.identity["tasks"].get(task, {}), part.iloc[0].to_dict()
        scores = ("expert_score", "floor", "chance")
        written = {name: numbers.score(first[name], percent=percent.get(task, True)) for name in scores}
        found.append({**own, **first, **written, "task": task})
    return found


def _beside(board: Leaderboard, figure: Mapping[str, Any]) -> dict[str, Any]:
    """Return a published figure with ours of the same method, protocol and kind of score, with its options if we can.

    `label` is the row of ours, None if there is none. `pairs` are a task, their score and ours.
    """
    options = (figure.get("options") or {}).items()
    same = [label for label, header in board.methods.items() if header.get("method", label) == figure["method"]]
    label = next((one for one in same if options <= board.methods[one]["options"].items()), next(iter(same), None))
    cells = board.cells[(board.cells["protocol"] == figure["protocol"]) & (board.cells["method"] == label)]
    column = "score" if figure["compares"] == "absolute" else "normalized"
    own = dict(zip(cells["task"], cells[column], strict=True))
    scores = figure["scores"] or {}
    pairs = [(task, score, own.get(task)) for task, score in scores.items()]
    if figure["mean"] is not None:
        averaged = [own.get(task) for task in scores or own]
        known = [score for score in averaged if numbers.known(score)]
        pairs.append(
            ("mean", figure["mean"], sum(known) / len(known) if known and len(known) == len(averaged) else None)
        )
    return {**figure, "label": label if len(cells) else None, "pairs": pairs}


@functools.cache
def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("twin_bench.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    writing = (numbers.points, numbers.count, numbers.interval, numbers.size, numbers.duration, numbers.times)
    found.filters |= {one.__name__: one for one in writing}
    found.filters |= {"address": _address, "option": lambda value: json.dumps(value, default=str, ensure_ascii=False)}
    return found


def _source(templates: jinja2.Environment, name: str) -> str:
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def _address(paper: str) -> str:
    """Return the address of a paper; empty if it has none that is known."""
    found = _ARXIV.match(paper)
    if found:
        return f"https://arxiv.org/abs/{found[1]}"
    return paper if re.match(r"https?://", paper) else ""


def _json(value: Any) -> Markup:
    """Return plain data as JSON that ends no script element and starts no markup, whatever its texts are."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_unknown)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _unknown(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))
