"""twin-bench schema."""

from __future__ import annotations

import argparse

SUMMARY = "print the JSON Schema of a recipe, a merge recipe or a suite, which editors read"
FILES = ("recipe", "merge", "suite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's argument."""
    parser.add_argument("file", choices=FILES, help="the kind of file: twin-bench build's, merge's or leaderboard's")


def run(options: argparse.Namespace) -> None:
    """Print the schema."""
    import json

    from twin_bench.config import Settings
    from twin_bench.leaderboard.suite import Suite
    from twin_bench.merging.recipe import MergeRecipe
    from twin_bench.twin.recipe import Recipe

    kinds: dict[str, type[Settings]] = dict(zip(FILES, (Recipe, MergeRecipe, Suite), strict=True))
    print(json.dumps(kinds[options.file].model_json_schema(), indent=1))
