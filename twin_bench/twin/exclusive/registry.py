"""The registry of kinds of exclusive vectors: their headers, and how a kind is found by its name.

A kind is a function in a file of `twin_bench/twin/exclusive/kinds/` with `@exclusive_kind(...)` above it. It takes one
expert's differences from the shared expert and returns what is kept of them. The function's name is the kind's name,
its docstring is the documentation, and its keywords are the options. A keyword without a default must be given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from twin_bench.errors import InputError, named, nearest
from twin_bench.merging.plugins import load_package
from twin_bench.twin.exclusive.forms import Exclusive, ExpertDifferences

KindFunction = Callable[..., Exclusive]


@dataclass(frozen=True)
class ExclusiveKind:
    """A kind's header: its name, what documents say about it, its options, and the function that computes it.

    `options` maps each option to whether it must be given. `draws` says whether the result depends on the seed.
    """

    name: str
    title: str
    paper: str
    documentation: str
    options: Mapping[str, bool]
    draws: bool
    function: KindFunction

    def require(self, given: Mapping[str, Any]) -> None:
        """Raise an InputError for an option that this kind does not have, or one that it needs and `given` lacks."""
        for option in given:
            if option not in self.options:
                raise InputError(f"kind {self.name} has no option {option!r}{nearest(option, self.options)}")
        for option, needed in self.options.items():
            if needed and option not in given:
                raise InputError(f"kind {self.name} needs {option}")

    def of(self, differences: ExpertDifferences, options: Mapping[str, Any]) -> Exclusive:
        """Return the exclusive vector of one expert. Raises InputError for an option out of its range."""
        self.require(options)
        return self.function(differences, **options)


REGISTRY: dict[str, ExclusiveKind] = {}
"""The registered kinds by name. `known_kinds` first imports the modules that register them."""


def exclusive_kind(*, title: str, paper: str, draws: bool = False) -> Callable[[KindFunction], KindFunction]:
    """Register the decorated function `(differences, *, options)` as the kind of its own name."""

    def decorate(function: KindFunction) -> KindFunction:
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        REGISTRY[function.__name__] = ExclusiveKind(
            name=function.__name__,
            title=title,
            paper=paper,
            documentation=inspect.getdoc(function) or "",
            options=MappingProxyType({p.name: p.default is p.empty for p in keywords}),
            draws=draws,
            function=function,
        )
        return function

    return decorate


def known_kinds() -> Mapping[str, ExclusiveKind]:
    """Return the headers of all kinds by name, in the order of their names."""
    load_package(f"{__package__}.kinds")
    return MappingProxyType({name: REGISTRY[name] for name in sorted(REGISTRY)})


def find_kind(name: str) -> ExclusiveKind:
    """Return the header of the kind `name`. Raises an InputError that suggests the nearest name if it is unknown."""
    return named(name, known_kinds(), "kind of exclusive vectors")
