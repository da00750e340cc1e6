"""What the front of a server reads of an export: serving.json, which names the adapters and their fusion weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from twin_bench.config import Settings, parse
from twin_bench.errors import InputError
from twin_bench.files import read_json, write_json

FILE = "serving.json"
SHARED = "twin/shared"
"""The name under which the server offers the shared expert. No expert's name has a / in it."""
ROUTED = "twin/routed"
"""The name under which the front offers the twin."""


class Served(Settings):
    """The models of a server, for its front.

    `experts` are in the order of the router's weights. `adapters` maps each adapter's name to its fusion weights, one
    for each expert. `max_length` is how many tokens of a prompt the router reads, the last ones.
    """

    format: Literal[1] = 1
    experts: tuple[str, ...] = Field(min_length=1)
    adapters: dict[str, tuple[float, ...]] = Field(min_length=1)
    max_length: int = Field(ge=1)


def write_served(root: Path, served: Served) -> None:
    """Write serving.json to an export's folder."""
    write_json(root / FILE, served.model_dump())


def read_served(directory: Path) -> Served:
    """Return what `write_served` wrote. InputError that names the file for what is missing or wrong."""
    file = directory / FILE
    if not file.is_file():
        raise InputError(f"{directory}: no {FILE} there; write one with twin-bench export TWIN DIRECTORY --format vllm")
    served = parse(Served, read_json(file), str(file))
    for name, weights in served.adapters.items():
        if len(weights) != len(served.experts):
            raise InputError(
                f"{file}: adapters.{name}: {len(weights)} weights for {len(served.experts)} experts; export again"
            )
    return served
