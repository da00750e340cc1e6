"""twin-bench convert."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "convert a GGUF file to an ordinary checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("gguf", metavar="FILE", type=Path, help="the GGUF file")
    parser.add_argument(
        "directory", metavar="DIRECTORY", type=Path, help="the folder to write the checkpoint to; it must not exist yet"
    )


def run(options: argparse.Namespace) -> None:
    """Convert the file; InputError where it is no GGUF file that can be read."""
    from twin_bench.checkpoints.gguf import convert

    convert(options.gguf, options.directory)
    print(f"{options.directory}: an ordinary checkpoint, float32")
