"""twin-bench export."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write a twin as PEFT adapters, as what vLLM serves, or as one merged checkpoint"

FORMATS = "peft: an adapter an expert; vllm: the shared model, adapters and a server's command line; hf: one checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("twin", metavar="TWIN", type=Path, help="the twin, from twin-bench build")
    parser.add_argument(
        "directory", metavar="DIRECTORY", type=Path, help="the folder to write to; it must not exist yet"
    )
    parser.add_argument("--format", metavar="FORMAT", required=True, help=FORMATS)
    parser.add_argument("--expert", metavar="NAME", help="export this expert alone")
    parser.add_argument(
        "--weights",
        metavar="[NAME=]W1,W2,...",
        action="append",
        default=[],
        help="export the mixture of these fusion weights, a number for each expert in the twin's order; an adapter "
        "beside the experts', or the one model of hf. May be given several times with different names",
    )
    parser.add_argument("--head", metavar="NAME", help="hf: the expert whose head a classifier's mixture gets")
    parser.add_argument(
        "--pad-ranks", action="store_true", help="peft: pad all matrices with zeros to the largest rank"
    )
    parser.add_argument(
        "--leave-out",
        action="store_true",
        help="peft, vllm: leave out what an adapter can't hold, in place of refusing, and say what is lost",
    )
    parser.add_argument(
        "--data",
        metavar="ROWS",
        type=Path,
        help='peft, vllm: measure on these rows what leaving out changes: JSON lines {"text": ..., "task": EXPERT}, or '
        "a folder of EXPERT/train.jsonl",
    )


def run(options: argparse.Namespace) -> None:
    """Export, and print what was written and what was lost; InputError for what is wrong or would be lost unasked."""
    from twin_bench.export.run import export_twin

    names = ("head", "pad_ranks", "leave_out", "data")
    given = {name: value for name in names if (value := getattr(options, name)) not in (None, False)}
    lines = export_twin(
        options.twin,
        options.directory,
        to=options.format,
        expert=options.expert,
        weights=options.weights,
        **given,
    )
    print("\n".join([f"{options.directory}: {lines[0]}", *lines[1:]]))
