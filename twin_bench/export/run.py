"""Writing a twin in another format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twin_bench.checkpoints.skeleton import quiet_transformers
from twin_bench.export.registry import find_format
from twin_bench.export.selection import selection
from twin_bench.export.stored import open_twin
from twin_bench.files import written_at_once


def export_twin(
    twin: Path, directory: Path, *, to: str, expert: str | None = None, weights: Sequence[str] = (), **options: Any
) -> list[str]:
    """Write a twin to `directory` in the format `to`. The folder appears whole or not at all.

    Args:
        twin: a twin directory.
        directory: it must not exist yet.
        to: a format's name: peft, vllm or hf.
        expert: the expert that is exported alone.
        weights: mixtures that are exported, each a text `W1,W2,...` or `NAME=W1,W2,...`.
        **options: the format's own.

    Returns:
        Lines that tell what was written, and what was left out.

    Raises:
        InputError: what is wrong with the twin, the weights or an option, or what the format cannot hold.
    """
    chosen = find_format(to)
    with written_at_once(directory) as root, quiet_transformers():
        opened = open_twin(twin)
        return chosen.write(opened, selection(opened.experts, expert, weights), root, options)
