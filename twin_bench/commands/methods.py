"""twin-bench methods."""

from __future__ import annotations

import argparse

from twin_bench.console import add_plugins

SUMMARY = "list the merge methods"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--markdown", action="store_true", help="print the whole catalogue in Markdown, with formulas and papers"
    )
    add_plugins(parser)


def run(options: argparse.Namespace) -> None:
    """Print a table of the methods, or the catalogue."""
    from rich.console import Console
    from rich.table import Table

    from twin_bench.merging.catalogue import markdown
    from twin_bench.merging.plugins import load_plugins
    from twin_bench.merging.registry import methods

    load_plugins(options.plugin)
    if options.markdown:
        print(markdown(), end="")
        return
    table = Table("name", "track", "needs", "defaults", "paper", box=None)
    table.columns[0].no_wrap = True
    for method in methods().values():
        defaults = ", ".join(f"{option}={value}" for option, value in method.defaults.items())
        table.add_row(method.name, method.track, ", ".join(method.needs), defaults, method.paper)
    Console().print(table)
