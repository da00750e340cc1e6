"""twin-bench bench, which is also python -m twin_bench.bench."""

from __future__ import annotations

import argparse
from pathlib import Path

from twin_bench.console import add_device, add_dtype

SUMMARY = "measure how fast a twin is beside the plain model, the authors' per-sample merge and PEFT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--twin", metavar="DIRECTORY", type=Path, required=True, help="the twin, from twin-bench build")
    parser.add_argument(
        "--data",
        metavar="DIRECTORY",
        type=Path,
        required=True,
        help="the rows: a folder that holds TASK/SPLIT.jsonl for each expert",
    )
    parser.add_argument("--split", default="validation", help="the split to take rows from (default: validation)")
    parser.add_argument(
        "--rows", type=int, default=512, help="how many rows; each task gives equally many (default: 512)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="how many rows a forward pass takes (default: 32)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each case is measured; the median counts (default: 5)"
    )
    parser.add_argument(
        "--merged-rows", type=int, default=16, help="how many rows the slow per-sample merge gets (default: 16)"
    )
    parser.add_argument("--only", metavar="CASE", nargs="+", default=(), help="run these cases alone (default: all)")
    add_device(parser)
    add_dtype(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the JSON to this file, not to the terminal")


def run(options: argparse.Namespace) -> None:
    """Measure, print a table and write the JSON. Raises InputError if the twin or its rows are missing."""
    import json

    from rich.console import Console
    from rich.table import Table

    from twin_bench.bench.run import bench
    from twin_bench.files import write_text

    result = bench(
        options.twin,
        options.data,
        split=options.split,
        rows=options.rows,
        batch_size=options.batch_size,
        rounds=options.rounds,
        merged_rows=options.merged_rows,
        device=options.device,
        dtype=options.dtype,
        only=options.only,
    )
    table = Table("case", "a second", "ratio", "against", box=None)
    for name, case in result["cases"].items():
        table.add_row(name, f"{case['per_second']:.1f}", f"{case['ratio']:.3f}", case["against"])
    Console().print(table)
    text = json.dumps(result, indent=1)
    if options.out:
        write_text(options.out, text + "\n")
    else:
        print(text)
