"""A leaderboard as Markdown."""

from __future__ import annotations

import html

from twin_bench.report.answer import warned
from twin_bench.report.legend import legend
from twin_bench.report.tables import table
from twin_bench.results.board import Leaderboard


def markdown(board: Leaderboard) -> str:
    """Return the leaderboard as Markdown: for each protocol the answer and the table, then the legend."""
    sections = [f"# {board.identity['suite']}\n"]
    for protocol in board.protocols:
        shown = table(board, protocol)
        lines = ["| " + " | ".join(shown.columns) + " |", "|" + " --- |" * len(shown.columns)]
        lines += ["| " + " | ".join(line) + " |" for line in shown.itertuples(index=False)]
        said = " ".join(warned(board, protocol))
        sections.append(f"## Protocol: {protocol}\n\n{said}\n\n" + "\n".join(lines) + "\n")
    paragraphs = [html.escape(paragraph, quote=False) for paragraph in legend(board)]
    return "\n".join([*sections, "\n\n".join(paragraphs) + "\n"])
