"""The page's sections for one protocol: ranking, costs, heat map, router and differences, as plain data and SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twin_bench.report.answer import ordered
from twin_bench.report.charts import Line, Point, Reference, front, intervals, on_the_front, shares
from twin_bench.report.numbers import (
    count,
    difference,
    duration,
    group,
    interval,
    known,
    points,
    probability,
    ranks,
    times,
)
from twin_bench.report.routing import Routing
from twin_bench.report.words import CONSTANT
from twin_bench.results.board import Leaderboard

SHADES = 9
"""How many colours a heat map has from 0 to 100."""
REASONS = {
    "reference": "the reference",
    "best": "the best of its field",
    "constant": f"the constant answer: {CONSTANT}",
}
"""The comparisons that have a chart, in this order."""


def ranking(board: Leaderboard, protocol: str) -> dict[str, Any] | None:
    """Return the chart of normalized means with intervals in both forms; None if nothing is ranked."""
    lines: list[Line] = []
    band, last = 0, None
    for row in ordered(board, protocol).to_dict("records"):
        if not known(row["tie_group"]):
            continue
        told = bool(row["told_the_task"])
        band += last is not None and last != (told, row["tie_group"])
        last = told, row["tie_group"]
        letter, place = group(row["tie_group"], told=told), ranks(row["rank_low"], row["rank_high"])
        score = interval(row["normalized"], row["ci_low"], row["ci_high"])
        words = f"{row['method']}: {score}, group {letter}, rank {place}"
        lines.append(
            Line(
                label=row["method"],
                value=row["normalized"],
                low=row["ci_low"],
                high=row["ci_high"],
                note=f"{letter}: rank {place}",
                tone="told" if told else "lead" if row["tie_group"] == 1 else "plain",
                band=band,
                words=f"{words}, told the task" if told else words,
            )
        )
    if not lines:
        return None
    bounds = ordered(board, protocol)
    bounds = bounds[bounds["bound"].astype(bool) & bounds["normalized"].notna()]
    references = [
        Reference(f"{label} {points(value)}", value)
        for label, value in zip(bounds["method"], bounds["normalized"], strict=True)
    ]
    return _both(intervals, lines, references, "normalized mean, points")


def unranked(board: Leaderboard, protocol: str) -> list[str]:
    """Return the methods that have no rank, because a score that their mean needs is missing."""
    lines = ordered(board, protocol)
    return list(lines.loc[lines["tie_group"].isna() & ~lines["bound"].astype(bool), "method"])


def costs(board: Leaderboard, protocol: str) -> list[dict[str, Any]]:
    """Return the charts of score against storage and against the model's time, each with its front in words."""
    score = scored_by(board)
    found = []
    for title, column, scale, axis, written in (
        ("storage", "relative_storage", 1.0, "stored, relative to one model", times),
        ("model time", "model_seconds_per_row", 1000.0, "model time a row, milliseconds", duration),
    ):
        lines = board.summary[board.summary["protocol"] == protocol]
        missing = list(lines.loc[lines[column].isna() & lines[score].notna() & ~lines["bound"].astype(bool), "method"])
        lines = lines[lines[column].notna() & lines[score].notna() & (lines[column] > 0)]
        chart: dict[str, Any] = {"title": title, "front": [], "wide": None, "missing": missing}
        if lines["method"].nunique() > 1:
            told = lines["told_the_task"].astype(bool)
            fronts = dict.fromkeys(lines.index, False)
            fronts |= zip(
                lines.index[~told], on_the_front(lines.loc[~told, column], lines.loc[~told, score]), strict=True
            )
            dots = [
                Point(
                    label=row["method"],
                    x=scale * row[column],
                    y=row[score],
                    tone=_tone(row),
                    front=fronts[number],
                    words=f"{row['method']}: {score} {points(row[score])}, {title} {written(row[column])}",
                )
                for number, row in lines.to_dict("index").items()
            ]
            best = sorted((dot for dot in dots if dot.front), key=lambda dot: dot.x)
            chart |= _both(front, dots, axis, f"{score}, points")
            chart["front"] = [f"{dot.label} ({written(dot.x / scale)}, {points(dot.y)})" for dot in best]
        found.append(chart)
    return found


def heat(board: Leaderboard, protocol: str) -> dict[str, Any]:
    """Return the heat map of methods and tasks: gains where there are floors, else normalized scores."""
    score = scored_by(board)
    cells = board.cells[board.cells["protocol"] == protocol]
    values = {(row["method"], row["task"]): row[score] for row in cells.to_dict("records")}
    tasks = board.tasks[board.tasks["protocol"] == protocol].to_dict("records")
    weak = {task["task"] for task in tasks if score == "gain" and task["weak"]}
    lines = [
        {
            "label": method,
            "cells": [
                _heat_cell(values.get((method, task["task"])), coloured=task["task"] not in weak) for task in tasks
            ],
        }
        for method in ordered(board, protocol)["method"]
    ]
    return {"score": score, "columns": [task["task"] for task in tasks], "lines": lines}


def matrix(board: Leaderboard) -> dict[str, Any] | None:
    """Return the scores of every expert on every task, shaded relative to the best of each task."""
    if board.matrix is None or board.matrix.empty:
        return None
    found = {(row["expert"], row["task"]): row for row in board.matrix.to_dict("records")}
    experts, tasks = (list(dict.fromkeys(board.matrix[column])) for column in ("expert", "task"))
    best = board.matrix.groupby("task")["score"].max()
    own = {task: expert for task, expert in zip(board.tasks["task"], board.tasks["expert"], strict=True)}
    percent = dict(zip(board.cells["task"], board.cells["percent"], strict=True))
    lines = []
    for expert in experts:
        line = []
        for task in tasks:
            row = found.get((expert, task))
            value = None if row is None else row["score"]
            shown = (
                "" if row is None else interval(value, row["ci_low"], row["ci_high"], percent=percent.get(task, True))
            )
            text, _, aside = shown.partition(" ")
            relative = 100 * value / best[task] if known(value) and best[task] > 0 else None
            line.append({"text": text, "aside": aside, "shade": shade(relative), "own": own.get(task) == expert})
        lines.append({"label": expert, "cells": line})
    return {"columns": tasks, "lines": lines}


def routers(routings: Mapping[tuple[str, str], Routing], protocol: str) -> list[dict[str, Any]]:
    """Return for each method with a router where its tasks' rows go, and how large the largest weight is."""
    found = []
    for (own, method), routing in routings.items():
        if own != protocol:
            continue
        lines, falls = [], any(routing.fallen.values())
        for task, counts in routing.counts.items():
            rows = sum(counts.values()) + routing.fallen[task] or 1
            own_expert = routing.own_experts[task]
            line = [_share(100 * number / rows, own=expert == own_expert) for expert, number in counts.items()]
            if falls:
                line.append(_share(100 * routing.fallen[task] / rows, own=False))
            lines.append({"label": task, "rows": count(rows), "cells": line})
        total = int(routing.own.sum() + routing.other.sum()) or 1
        found.append(
            {
                "method": method,
                "columns": [*routing.experts, *(["shared expert"] if falls else [])],
                "lines": lines,
                "right": f"{100 * routing.own.sum() / total:.1f}%",
                "chart": shares(routing.own.tolist(), routing.other.tolist(), "the largest weight"),
            }
        )
    return found


def differences(board: Leaderboard, protocol: str) -> list[dict[str, Any]]:
    """Return for each kind of comparison the chart of differences and the same as a table."""
    found = []
    told = dict(zip(board.summary["method"], board.summary["told_the_task"].astype(bool), strict=True))
    for reason, words in REASONS.items():
        lines = board.comparisons
        lines = lines[(lines["protocol"] == protocol) & (lines["reason"] == reason) & lines["difference"].notna()]
        for against, part in lines.groupby("against", sort=False):
            rows = part.sort_values("difference", ascending=False).to_dict("records")
            drawn, table = [], []
            for place, row in enumerate(rows):
                apart = bool(row["sure"])
                gap = difference(row["difference"], row["ci_low"], row["ci_high"])
                p = probability(row["p_holm"])
                verdict = "can't be told apart" if not apart else "better" if row["difference"] > 0 else "worse"
                tone = "told" if told.get(row["method"]) else "lead" if apart and row["difference"] > 0 else "plain"
                drawn.append(
                    Line(
                        label=row["method"], value=row["difference"], low=row["ci_low"], high=row["ci_high"],
                        note=verdict, tone=tone, band=place, words=f"{row['method']}: {gap}, p {p}, {verdict}",
                    )
                )  # fmt: skip
                table.append((row["method"], gap, p, verdict))
            chart = _both(intervals, drawn, [Reference(f"{against}", 0.0)], f"difference from {against}, points")
            found.append({"against": against, "reason": words, "table": table, **chart})
    return found


def scored_by(board: Leaderboard) -> str:
    """Return `gain` if methods have gains, else `normalized`."""
    return "gain" if board.summary.loc[~board.summary["bound"].astype(bool), "gain"].notna().any() else "normalized"


def shade(value: float | None) -> str:
    """Return the class of a value's colour: one of SHADES from 0 to 100, another below 0, none where it is unknown."""
    if not known(value):
        return ""
    return "below" if value < -0.5 else f"h{min(max(int(value * SHADES / 100), 0), SHADES - 1)}"


def _heat_cell(value: float | None, *, coloured: bool) -> dict[str, Any]:
    shown = shade(value) if coloured else ""
    return {"text": points(value) if known(value) else "", "aside": "", "shade": shown, "own": False}


def _share(share: float, *, own: bool) -> dict[str, Any]:
    return {"text": f"{share:.0f}%", "aside": "", "shade": shade(share), "own": own}


def _tone(row: Mapping[str, Any]) -> str:
    if row["bound"]:
        return "bound"
    return "told" if row["told_the_task"] else "lead" if row["tie_group"] == 1 else "plain"


def _both(chart: Any, *parts: Any) -> dict[str, str]:
    return {"wide": chart(*parts, narrow=False), "narrow": chart(*parts, narrow=True)}
