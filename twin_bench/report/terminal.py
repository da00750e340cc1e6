"""A leaderboard in a terminal: the answer, then as much of the table as the width holds."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twin_bench.report.answer import warned
from twin_bench.report.legend import legend
from twin_bench.report.tables import table
from twin_bench.results.board import Leaderboard

FIRST = ("method", "rank", "normalized")
"""The columns that are shown at any width."""
GAP = 2
WIDEST = 10_000
"""More than the width of any table, in characters."""


def print_leaderboard(board: Leaderboard, console: Console, *, wide: bool = False) -> None:
    """Print the answer and the table of each protocol, then the legend.

    Columns that the console's width does not hold are left out, and a line names them. `wide` prints all of them.
    """
    for protocol in board.protocols:
        console.print(f"{board.identity['suite']}, protocol {protocol}", style="bold", markup=False, highlight=False)
        console.print(" ".join(warned(board, protocol)), markup=False, highlight=False)
        shown = table(board, protocol)
        for column in set(shown.columns) - set(FIRST):
            shown[column] = [text.partition(" ±")[0] for text in shown[column]]  # the files have the errors
        widths = {column: max(len(column), *map(len, shown[column])) for column in shown.columns}
        kept = list(shown.columns) if wide else fitting(widths, console.width)
        printed = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        for column in kept:
            printed.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        for line in shown[kept].itertuples(index=False):
            printed.add_row(*map(escape, line))
        print_whole(printed, console)
        left_out = [column for column in shown.columns if column not in kept]
        if left_out:
            console.print(f"--wide also shows: {', '.join(left_out)}", markup=False, highlight=False)
        console.print()
    console.print("\n\n".join(legend(board)), highlight=False, markup=False)


def print_whole(table: Table, console: Console) -> None:
    """Print a table with all of each cell, also where that takes more than the console's width."""
    table.width = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    console.print(table, crop=False, no_wrap=True, overflow="ignore")


def fitting(widths: dict[str, int], width: int) -> list[str]:
    """Return the columns that fit into a width: the first ones in any case, then the others in their order."""
    kept = [column for column in widths if column in FIRST]
    room = width - sum(widths[column] + GAP for column in kept)
    for column, needed in widths.items():
        if column not in kept and needed + GAP <= room:
            kept.append(column)
            room -= needed + GAP
    return [column for column in widths if column in kept]
