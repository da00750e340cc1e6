"""twin-bench merge."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from twin_bench.console import add_device, add_dtype, add_plugins

SUMMARY = "merge experts into one ordinary checkpoint, or into one LoRA adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        type=Path,
        help="the merge recipe: a YAML file that names the base model, the experts and the method. A mergekit file "
        "is taken as well where it means the same here",
    )
    parser.add_argument(
        "directory", metavar="DIRECTORY", type=Path, help="the folder to write the result to; it must not exist yet"
    )
    add_device(parser, default="cpu")
    add_dtype(parser)
    add_plugins(parser)


def run(options: argparse.Namespace) -> None:
    """Merge, and print the result's size; InputError for what is wrong with the recipe."""
    from twin_bench.config import replaced
    from twin_bench.console import progress_bars
    from twin_bench.merging.export import merge_to_directory, read_merge_recipe
    from twin_bench.merging.plugins import load_plugins
    from twin_bench.twin.device import usable_device

    load_plugins(options.plugin)
    recipe, difference = read_merge_recipe(options.recipe)
    recipe = replaced(recipe, dtype=options.dtype)
    if difference:
        print(f"note: {difference}", file=sys.stderr)
    with progress_bars(options) as progress:
        parameters = merge_to_directory(
            recipe, options.directory, device=usable_device(options.device), progress=progress
        )
    print(f"{options.directory}: {parameters:,} parameters, merged by {recipe.merge.method}")
