"""The twin-bench command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from twin_bench.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `twin-bench`; return the exit status: 0 done, 2 a usage or input error."""
    parser = argparse.ArgumentParser(
        prog="twin-bench", description="Merge models, build twins, and find what comes with twin-bench."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build a twin from a recipe")
    build.add_argument("recipe", type=Path, help="the recipe, YAML")
    build.add_argument("directory", type=Path, help="where the twin goes; must not exist yet")
    build.set_defaults(run=_build)
    merge = commands.add_parser("merge", help="merge experts into an ordinary checkpoint, or one LoRA adapter")
    merge.add_argument(
        "recipe", type=Path, help="the merge recipe, YAML; a mergekit file does where both mean the same"
    )
    merge.add_argument("directory", type=Path, help="where the result goes; must not exist yet")
    merge.set_defaults(run=_merge)
    tasks = commands.add_parser("tasks", help="print the folder of lm-eval tasks, for --include_path")
    tasks.set_defaults(run=_tasks)
    methods = commands.add_parser("methods", help="list the merge methods")
    methods.add_argument("--markdown", action="store_true", help="print the whole catalogue, formulas and papers")
    methods.set_defaults(run=_methods)
    convert = commands.add_parser("convert", help="make a GGUF file an ordinary checkpoint")
    convert.add_argument("gguf", type=Path, help="the GGUF file")
    convert.add_argument("directory", type=Path, help="where the checkpoint goes; must not exist yet")
    convert.set_defaults(run=_convert)
    helm = commands.add_parser("helm-config", help="tell HELM of a twin")
    helm.add_argument("twin", type=Path, help="the twin directory")
    helm.add_argument("--name", required=True, help="its name: it is model=twin_merged/NAME in run entries")
    helm.add_argument("--local-path", type=Path, default=Path("prod_env"), help="helm-run's (default: prod_env)")
    helm.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    helm.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the twin's own)")
    helm.add_argument("--protocol", default="standard", choices=("standard", "paper", "routed"))
    helm.add_argument("--tolerance", type=float, help="of the logits, relative to their size (default: 0 in float32)")
    helm.add_argument("--batch-size", type=int, default=8, help="requests a forward (default: 8)")
    helm.add_argument("--chat-template", action="store_true", help="ask each prompt as a user's turn")
    helm.set_defaults(run=_helm_config)
    options = parser.parse_args(arguments)
    return reporting_errors(lambda: options.run(options))


def reporting_errors(run: Callable[[], None]) -> int:
    """Run a command; an InputError becomes one line on stderr and status 2, an interrupt status 130."""
    try:
        run()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _build(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from twin_bench.twin.builder import build_twin
    from twin_bench.twin.cache import named_directory
    from twin_bench.twin.recipe import read_recipe

    recipe = read_recipe(options.recipe)
    with Progress(console=Console(stderr=True)) as progress:
        settings = build_twin(recipe, options.directory, feature_cache=named_directory(), progress=progress)
    parameters, router = settings["parameters"], settings["router"]
    print(f"{options.directory}: {parameters['shared']:,} shared parameters, {parameters['exclusive']:,} exclusive")
    if router:
        held_out = f"{router['accuracy']:.3f} accuracy on {router['selection_rows']} held-out rows"
        print(f"router on layer {router['layer']}: {held_out}")


def _merge(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from twin_bench.merging.export import merge_to_directory, read_merge_recipe

    recipe, difference = read_merge_recipe(options.recipe)
    if difference:
        print(f"note: {difference}", file=sys.stderr)
    with Progress(console=Console(stderr=True)) as progress:
        parameters = merge_to_directory(recipe, options.directory, progress=progress)
    print(f"{options.directory}: {parameters:,} parameters, merged by {recipe.merge.method}")


def _convert(options: argparse.Namespace) -> None:
    from twin_bench.checkpoints.gguf import convert

    convert(options.gguf, options.directory)
    print(f"{options.directory}: an ordinary checkpoint, float32")


def _helm_config(options: argparse.Namespace) -> None:
    from twin_bench.helm_config import write_helm_config

    files = write_helm_config(
        options.twin,
        options.name,
        options.local_path,
        device=options.device,
        dtype=options.dtype,
        protocol=options.protocol,
        tolerance=options.tolerance,
        batch_size=options.batch_size,
        apply_chat_template=options.chat_template,
    )
    print(f"twin_merged/{options.name} is in {', '.join(map(str, files))}")


def _tasks(options: argparse.Namespace) -> None:
    from twin_bench.paths import tasks_directory

    print(tasks_directory())


def _methods(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from twin_bench.merging.catalogue import markdown
    from twin_bench.merging.registry import methods

    if options.markdown:
        print(markdown(), end="")
        return
    table = Table("name", "track", "needs", "defaults", "paper", box=None)
    table.columns[0].no_wrap = True
    for method in methods().values():
        defaults = ", ".join(f"{option}={value}" for option, value in method.defaults.items())
        table.add_row(method.name, method.track, ", ".join(method.needs), defaults, method.paper)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
