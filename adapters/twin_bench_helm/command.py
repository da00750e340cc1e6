"""twin-bench helm-config: see `twin_bench.cli` for what a command's module holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from twin_bench.errors import InputError

PLANNED = ("auto", "balanced", "balanced_low_0", "sequential")
"""The maps that are planned, as `twin_bench.twin.placement` has them, which is slow to import."""
SUMMARY = "tell HELM of a twin: write its entries into the files that helm-run reads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("twin", metavar="TWIN", type=Path, help="the folder of a twin of language models")
    parser.add_argument("--name", required=True, help="the twin's name in HELM: run entries say model=twin_merged/NAME")
    parser.add_argument(
        "--local-path",
        metavar="DIRECTORY",
        type=Path,
        default=Path("prod_env"),
        help="the folder of HELM's files, helm-run's --local-path (default: prod_env)",
    )
    parser.add_argument("--device", help="where the twin runs: cpu, cuda, cuda:1, mps or auto (default: auto)")
    parser.add_argument(
        "--device-map",
        choices=PLANNED,
        help="spread the twin over several devices (docs/scale/devices.md), in place of --device",
    )
    parser.add_argument(
        "--max-memory",
        metavar="SIZE",
        nargs="+",
        help="the largest memory to use: of one device a size, such as 40GB, and with --device-map one for each, such "
        "as 0=20GiB cpu=60GiB",
    )
    parser.add_argument("--offload-folder", help="where weights are written that --device-map leaves to the disk")
    parser.add_argument("--quantization", choices=("4bit", "8bit"), help="keep the shared expert in few bits")
    parser.add_argument("--dtype", help="what it computes in: float32, bfloat16 or float16 (default: the twin's own)")
    parser.add_argument(
        "--protocol",
        default="standard",
        choices=("standard", "paper", "routed"),
        help="what the twin is told of an input's task; docs/protocols.md explains it (default: standard)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="how far logits may lie from the exact ones, relative to their size, for speed (default: 6e-8 in float32)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="how many rows a forward pass takes (default: 8)")
    parser.add_argument(
        "--compile",
        default="off",
        choices=("auto", "on", "off"),
        help="when the steps of a text are compiled: auto is on a CUDA device, for many steps (default: off)",
    )
    parser.add_argument(
        "--chat-template",
        action="store_true",
        help="ask each prompt as a user's turn, in the tokenizer's chat template",
    )
    parser.add_argument("--replace", action="store_true", help="replace the entries that the files have of that name")


def run(options: argparse.Namespace) -> None:
    """Write the files and name them; InputError for a setting, a twin or files that do not suit."""
    from twin_bench_helm.config import write_helm_config

    files = write_helm_config(
        options.twin,
        options.name,
        options.local_path,
        device=options.device,
        dtype=options.dtype,
        protocol=options.protocol,
        tolerance=options.tolerance,
        batch_size=options.batch_size,
        compile=options.compile,
        apply_chat_template=options.chat_template,
        device_map=options.device_map,
        max_memory=_sizes(options.max_memory),
        offload_folder=options.offload_folder,
        quantization=options.quantization,
        replace=options.replace,
    )
    print(f"twin_merged/{options.name} is in {', '.join(map(str, files))}")


def _sizes(given: Sequence[str] | None) -> dict[int | str, int | str] | str | None:
    """Return the sizes of devices that the command line names, as DEVICE=SIZE each, or the one size without a name."""
    if given is None:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    sizes: dict[int | str, int | str] = {}
    for one in given:
        device, equals, size = one.partition("=")
        if not equals or not device or not size:
            raise InputError(f"--max-memory {one}: give DEVICE=SIZE, such as 0=20GiB or cpu=60GiB")
        sizes[int(device) if device.isdecimal() else device] = int(size) if size.isdecimal() else size
    return sizes
