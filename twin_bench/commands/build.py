"""twin-bench build."""

from __future__ import annotations

import argparse
from pathlib import Path

from twin_bench.console import add_batch_size, add_device, add_dtype, add_plugins, positive

SUMMARY = "build a twin from a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        type=Path,
        help="the recipe: a YAML file that names the base model, the experts, and how to compress and route them",
    )
    parser.add_argument(
        "directory", metavar="DIRECTORY", type=Path, help="the folder to write the twin to; it must not exist yet"
    )
    add_device(parser)
    add_dtype(parser)
    add_batch_size(parser, "as many as 8,192 tokens hold, and no more than 64")
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        default=1,
        help="how many processes compute the tensors; each needs memory for its own, and opens the inputs itself. With "
        "several GPUs they take turns (default: 1)",
    )
    add_plugins(parser)


def run(options: argparse.Namespace) -> None:
    """Build the twin, and print its size and its router's accuracy; InputError for what is wrong with the recipe."""
    from twin_bench.config import replaced
    from twin_bench.console import progress_bars
    from twin_bench.merging.plugins import load_plugins
    from twin_bench.twin.builder import build_twin
    from twin_bench.twin.cache import named_directory
    from twin_bench.twin.recipe import read_recipe

    load_plugins(options.plugin)
    recipe = replaced(read_recipe(options.recipe), dtype=options.dtype)
    with progress_bars(options) as progress:
        settings = build_twin(
            recipe,
            options.directory,
            device=options.device,
            batch_size=options.batch_size,
            feature_cache=named_directory(),
            progress=progress,
            resumable=True,
            workers=options.workers,
            plugins=options.plugin,
        )
    parameters, router = settings["parameters"], settings["router"]
    print(f"{options.directory}: {parameters['shared']:,} shared parameters, {parameters['exclusive']:,} exclusive")
    if router:
        held_out = f"{router['accuracy']:.3f} accuracy on {router['report_rows']} held-out rows"
        print(f"router on layer {router['layer']}: {held_out}")
