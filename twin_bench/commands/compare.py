"""twin-bench compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from twin_bench.commands.report import import_plugins
from twin_bench.console import add_plugins

SUMMARY = "compare two directories of results, method by method on the rows that both have scored"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("first", metavar="FIRST", type=Path, help="the --out of a twin-bench leaderboard")
    parser.add_argument("second", metavar="SECOND", type=Path, help="that of another one")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write the table to this file as well")
    add_plugins(parser)


def run(options: argparse.Namespace) -> None:
    """Print a line for each method and task that both directories hold."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from twin_bench.files import write_text
    from twin_bench.report.numbers import difference, points, probability
    from twin_bench.report.terminal import print_whole
    from twin_bench.results.compare import compare

    import_plugins(options)
    found = compare(options.first, options.second)
    if options.csv is not None:
        write_text(options.csv, found.to_csv(index=False))
    table = Table(box=None, pad_edge=False)
    for column in ("protocol", "method", "task", "rows", "first", "second", "difference (95%)", "p"):
        table.add_column(column, justify="right" if column in ("rows", "first", "second") else "left", no_wrap=True)
    for line in found.to_dict("records"):
        whole = line["p_holm"] is not None and line["p_holm"] == line["p_holm"]
        table.add_row(
            *map(escape, (line["protocol"], line["method"], line["task"], str(line["rows"]))),
            points(line["first"]),
            points(line["second"]),
            difference(line["difference"], line["ci_low"], line["ci_high"]),
            f"{probability(line['p'])}{' (Holm ' + probability(line['p_holm']) + ')' if whole else ''}",
        )
    console = Console()
    print_whole(table, console)
    console.print(
        "Scores in points, or in the metric's own unit where it is no fraction; difference: "
        f"{options.first} minus {options.second}, paired over the rows that both have scored, with 95% intervals.",
        highlight=False,
        markup=False,
    )
