"""python -m twin_bench.leaderboard: run a suite and print its table; with no arguments, the embedded demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the leaderboard command; return the exit status."""
    from twin_bench.cli import reporting_errors

    parser = argparse.ArgumentParser(prog="python -m twin_bench.leaderboard", description=__doc__)
    parser.add_argument("--suite", default="demo", help="a suite file, or a name in leaderboards/ (default: demo)")
    parser.add_argument("--methods", help="labels or method names, comma-separated; the bounds run in any case")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where results go (default: results)")
    parser.add_argument("--harness", default="lm-eval", help="which harness scores: lm-eval or helm (default: lm-eval)")
    parser.add_argument("--limit", type=_positive, help="score the first N rows of each task")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="add a row NAME+tuned: the method with options chosen on held-out training rows, never on scored ones",
    )
    options = parser.parse_args(arguments)
    return reporting_errors(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from twin_bench.leaderboard.report import leaderboard_rows, print_leaderboard, write_leaderboard
    from twin_bench.leaderboard.run import run_suite
    from twin_bench.leaderboard.suite import read_suite

    suite = read_suite(options.suite)
    only = None if options.methods is None else [name.strip() for name in options.methods.split(",")]
    with Progress(console=Console(stderr=True)) as progress:
        board = run_suite(
            suite,
            options.out,
            only=only,
            limit=options.limit,
            harness=options.harness,
            tune=options.tune,
            progress=progress,
        )
    table = write_leaderboard(board, options.out)
    console = Console()
    if console.width < 110:  # the table is 100 wide: let the terminal wrap it rather than cut figures
        console.width = 110
    print_leaderboard(leaderboard_rows(board.cells), table, console, board.skipped)
    print(f"Written to {options.out}: leaderboard.json, leaderboard.csv, leaderboard.md, index.html, skipped.json")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
