"""twin-bench report."""

from __future__ import annotations

import argparse
from pathlib import Path

from twin_bench.console import add_plugins

SUMMARY = "write a leaderboard's tables and page again from its results; no model is loaded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("out", metavar="DIRECTORY", type=Path, help="the --out of twin-bench leaderboard")
    add_comparison(parser)
    add_plugins(parser)


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """Add --compare-to and --wide."""
    parser.add_argument(
        "--compare-to", metavar="LABEL", help="also compare every method with this row, on the same rows of the tasks"
    )
    parser.add_argument("--wide", action="store_true", help="print all columns, also those that the terminal cuts")


def run(options: argparse.Namespace) -> None:
    """Read the results, write the report's files and print the table."""
    import_plugins(options)
    report(options.out, compare_to=options.compare_to, wide=options.wide)


def import_plugins(options: argparse.Namespace) -> None:
    """Import the files of --plugin. Without one nothing is imported: methods bring torch, which results don't need."""
    if options.plugin:
        from twin_bench.merging.plugins import load_plugins

        load_plugins(options.plugin)


def report(out: Path, *, compare_to: str | None, wide: bool) -> None:
    """Write the files of the report on the results in `out`, and print the table."""
    from rich.console import Console

    from twin_bench.report.files import FILES, write_report
    from twin_bench.report.terminal import print_leaderboard
    from twin_bench.results.stored import load_leaderboard

    board = load_leaderboard(out, compare_to=compare_to)
    write_report(board, out)
    print_leaderboard(board, Console(), wide=wide)
    print(f"Written to {out}: {', '.join(FILES)}")
