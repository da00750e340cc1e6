"""The registry of router kinds: their headers, and how a kind is found by its name.

A kind is a subclass of `Router` in a file of its own, with `@router_kind(...)` above it. Its docstring is its
documentation, and the keywords of its `fit` are its options. The files of `kinds/` are found by themselves. Kinds of
other packages are found as merge methods are: by the entry-point group `twin_bench.methods`, or as a plugin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from pydantic import create_model

from twin_bench.config import Settings, parse
from twin_bench.errors import InputError, named
from twin_bench.files import digest_code
from twin_bench.merging.plugins import load_methods, load_package
from twin_bench.twin.routers.base import Examples, Router, RouterConfig

RouterType = TypeVar("RouterType", bound=type[Router])


@dataclass(frozen=True)
class RouterKind:
    """A kind's header: what a catalogue says about it, its class, and its options as settings.

    `needs` lists in words what a fit reads. `origin` is the module and the class.
    """

    name: str
    title: str
    paper: str
    needs: tuple[str, ...]
    doc: str
    origin: str
    router: type[Router]
    options: type[Settings]

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options of the kind with their values. InputError names one that is unknown, or of no such value.

        The message says which options there are, if there are none.
        """
        if options and not self.options.model_fields:
            raise InputError(f"kind {self.name} has none; remove {', '.join(map(str, options))}")
        settings = parse(self.options, dict(options))
        return {name: getattr(settings, name) for name in self.options.model_fields}

    def fit(self, config: RouterConfig, examples: Examples, options: Mapping[str, Any]) -> Router:
        """Return a router of this kind, in evaluation mode, with fixed parameters. `options` are the kind's."""
        fitted: Router = self.router.fit(config, examples, **self.checked(options))
        return fitted.eval().requires_grad_(False)

    @property
    def identity(self) -> list[str]:
        """What stands for the kind's code in a key: its name, and the digest of another package's module."""
        return [self.name, *digest_code(self.router.__module__)]


REGISTRY: dict[str, RouterKind] = {}
"""The registered kinds by name. `router_kinds` first imports the modules that register them."""


def router_kind(
    name: str, *, title: str, paper: str, needs: tuple[str, ...] = ("task ids of training inputs",)
) -> Callable[[RouterType], RouterType]:
    """Register the decorated subclass of `Router` as the kind `name`.

    Raises InputError if another kind has the name. Loading the same module twice is not an error.
    """

    def decorate(router: RouterType) -> RouterType:
        origin = f"{router.__module__}.{router.__qualname__}"
        if name in REGISTRY and REGISTRY[name].origin != origin:
            raise InputError(f"two router kinds are named {name}: {REGISTRY[name].origin} and {origin}; rename one")
        hints = get_type_hints(router.fit, localns={router.__name__: router}, include_extras=True)
        keywords = [p for p in inspect.signature(router.fit).parameters.values() if p.kind is p.KEYWORD_ONLY]
        fields: dict[str, Any] = {p.name: (hints[p.name], p.default) for p in keywords}
        options = create_model(f"{router.__name__}Options", __base__=Settings, **fields)
        router.kind = name
        REGISTRY[name] = RouterKind(name, title, paper, needs, inspect.getdoc(router) or "", origin, router, options)
        return router

    return decorate


@cache
def _load_own() -> None:
    """Import this package's modules, which register its kinds."""
    load_package(f"{__package__}.kinds")


def router_kinds() -> Mapping[str, RouterKind]:
    """Return the headers of all kinds by name, in alphabetical order."""
    _load_own()
    load_methods()
    return MappingProxyType(dict(sorted(REGISTRY.items())))


def find_kind(name: str) -> RouterKind:
    """Return the header of kind `name`. Raises an InputError that suggests the nearest name if it is unknown."""
    _load_own()
    if isinstance(name, str) and name in REGISTRY:
        return REGISTRY[name]  # other packages are not asked for a kind of this one
    return named(name, router_kinds(), "router kind", "; a plugin's kind needs its plugin loaded")
