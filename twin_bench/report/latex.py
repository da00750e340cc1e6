"""A leaderboard as LaTeX, for a paper: a table with booktabs for each protocol."""

from __future__ import annotations

import re
from typing import Any

from twin_bench.report.numbers import known
from twin_bench.report.tables import in_order
from twin_bench.report.words import CONSTANT, seeds
from twin_bench.results.board import Leaderboard

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex(board: Leaderboard) -> str:
    r"""Return a `table*` for each protocol, which needs \usepackage{booktabs}.

    Means stand with their 95% interval, scores on tasks with their standard error. Of the methods that are not told the
    task, those of the leading tie group are bold. The caption says rows, seed and protocol.
    """
    return "\n".join(_table(board, protocol) for protocol in board.protocols)


def escaped(text: str) -> str:
    """Return a text in which LaTeX reads every character as itself."""
    return re.sub(r"[\\~^&%$#_{}]", lambda found: _SPECIAL[found.group()], text)


def _table(board: Leaderboard, protocol: str) -> str:
    cells = board.cells[board.cells["protocol"] == protocol]
    tasks = list(dict.fromkeys(cells["task"]))
    scores = {(cell["method"], cell["task"]): cell for cell in cells.to_dict("records")}
    summary = in_order(board, protocol).to_dict("records")
    retained = any(known(line["retention"]) for line in summary)
    head = ["Method", "Rank", "Normalized", "Gain", *(["Retention"] if retained else []), *map(escaped, tasks)]
    body, previous = [], None
    for line in summary:
        kind = line["bound"], line["told_the_task"]
        if previous is not None and kind != previous:
            body.append(r"\midrule")
        previous = kind
        name = escaped(line["method"])
        leads = line["tie_group"] == 1 and not line["told_the_task"]
        own = [
            rf"\textbf{{{name}}}" if leads else name,
            _rank(line),
            _interval(line["normalized"], line["ci_low"], line["ci_high"]),
            _interval(line["gain"], line["gain_ci_low"], line["gain_ci_high"]),
            *([_interval(line["retention"], line["retention_ci_low"], line["retention_ci_high"])] if retained else []),
            *(_score(scores.get((line["method"], task))) for task in tasks),
        ]
        body.append(" & ".join(own) + r" \\")
    rows = ", ".join(f"{task} {max(cells[cells['task'] == task]['n'])}" for task in tasks)
    caption = (
        f"{escaped(board.identity['suite'])}, protocol {protocol}, {seeds(board.identity)}. Means with 95\\% "
        "intervals of a joint bootstrap over rows, scores in points with standard errors. Gain is 0 for the constant "
        f"answer ({CONSTANT}) and 100 for the experts. Bold: the methods that are not told the task and can't be told "
        f"apart from the best of them. Rows: {escaped(rows)}."
    )
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering\small",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{lr{'r' * (len(head) - 2)}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def _rank(line: dict[str, Any]) -> str:
    low, high = line["rank_low"], line["rank_high"]
    if not known(low):
        return "--"
    return f"{low:.0f}" if low == high else f"{low:.0f}--{high:.0f}"


def _interval(value: float, low: float, high: float) -> str:
    if not known(value):
        return "--"
    return rf"{value:.1f} {{\scriptsize [{low:.1f}, {high:.1f}]}}" if known(low) else f"{value:.1f}"


def _score(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "--"
    error = "" if cell["stderr"] is None else rf" {{\scriptsize $\pm${cell['stderr']:.1f}}}"
    return f"{cell['score']:.1f}{error}"
