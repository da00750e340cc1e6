"""The registry of export formats: their headers, and how one is found by its name.

A format is a function in a file of `twin_bench/export/formats/` with `@export_format(...)` above it. It takes an opened
twin, what is asked for, and the folder to write to, and returns the lines that tell the user what was written. The
function's name is the format's name, its docstring is the documentation, and its keywords are its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from twin_bench.errors import InputError, named, nearest
from twin_bench.export.selection import Selection
from twin_bench.export.stored import StoredTwin
from twin_bench.merging.plugins import load_package

FormatFunction = Callable[..., list[str]]


@dataclass(frozen=True)
class ExportFormat:
    """A format's header: its name, one line about it, the names of its options, and the function that writes it."""

    name: str
    title: str
    options: frozenset[str]
    function: FormatFunction

    def write(self, twin: StoredTwin, asked: Selection, root: Path, options: Mapping[str, Any]) -> list[str]:
        """Write the format to the folder `root`; return lines for the user. InputError for an option it has not."""
        for option in options.keys() - self.options:
            flag = option.replace("_", "-")
            known = [name.replace("_", "-") for name in self.options]
            raise InputError(f"format {self.name} has no option {flag!r}{nearest(flag, known)}")
        return self.function(twin, asked, root, **options)


REGISTRY: dict[str, ExportFormat] = {}
"""The registered formats by name. `known_formats` first imports the modules that register them."""


def export_format(*, title: str) -> Callable[[FormatFunction], FormatFunction]:
    """Register the decorated function `(twin, asked, root, *, options)` as the format of its own name."""

    def decorate(function: FormatFunction) -> FormatFunction:
        keywords = (p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)
        REGISTRY[function.__name__] = ExportFormat(
            function.__name__, title, frozenset(p.name for p in keywords), function
        )
        return function

    return decorate


def known_formats() -> Mapping[str, ExportFormat]:
    """Return the headers of all formats by name, in the order of their names."""
    load_package(f"{__package__}.formats")
    return MappingProxyType({name: REGISTRY[name] for name in sorted(REGISTRY)})


def find_format(name: str) -> ExportFormat:
    """Return the header of the format `name`. InputError that suggests the nearest name if it is unknown."""
    return named(name, known_formats(), "format")
