"""twin-bench init."""

from __future__ import annotations

import argparse
from pathlib import Path

from twin_bench.console import add_plugins

SUMMARY = "write a first recipe and a first suite for the experts, rows and task files in a folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "directory",
        metavar="DIR",
        type=Path,
        help="where recipe.yaml and suite.yaml are written. Rows are looked for in DIR/rows or DIR/data, as "
        "{task}/train.jsonl and {task}/validation.jsonl, and lm-eval's task files anywhere in DIR",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--classifier",
        dest="kind",
        action="store_const",
        const="sequence_classification",
        help="take sequence classifiers alone (default: the kind that all experts are of)",
    )
    kind.add_argument(
        "--causal-lm", dest="kind", action="store_const", const="causal_lm", help="take causal language models alone"
    )
    parser.add_argument(
        "--experts",
        metavar="FOLDER",
        type=Path,
        help="where the experts are: folders with adapter_config.json or config.json, also one level below "
        "(default: DIR)",
    )
    parser.add_argument(
        "--base-model", metavar="MODEL", help="a path or a hub id (default: what all adapters name as their base model)"
    )
    add_plugins(parser)


def run(options: argparse.Namespace) -> None:
    """Write the files, and say what to run next; InputError where one is there, or nothing is found."""
    from twin_bench.checkpoints.found import find_experts
    from twin_bench.errors import InputError
    from twin_bench.files import write_json_lines, write_text
    from twin_bench.leaderboard.starter import ROUTER, starting
    from twin_bench.merging.plugins import load_plugins

    folder = options.directory
    recipe, suite, router = (folder / name for name in ("recipe.yaml", "suite.yaml", ROUTER))
    for file in (recipe, suite, router):
        if file.exists():
            raise InputError(f"{file}: exists already; remove it, or write to another folder: DIR --experts FOLDER")
    found = find_experts(options.experts or folder, kind=options.kind, base_model=options.base_model)
    load_plugins(options.plugin)
    start = starting(folder, found, [Path(file) for file in options.plugin])
    write_text(recipe, start.recipe)
    write_text(suite, start.suite)
    if start.router:
        write_json_lines(router, list(start.router))
    written = [recipe, suite, *([router] if start.router else [])]
    print(f"Written: {', '.join(map(str, written))}")
    print(f"Experts: {', '.join(expert.name for expert in found.experts)}. Base model: {found.base_model}.")
    print(f"Tasks: {', '.join(start.tasks) or 'none yet'}. The comments in the files say what is a guess. Then:")
    print(f"  twin-bench build {recipe} my-twin")
    print(f"  twin-bench leaderboard --suite {suite} --out results")
