"""Importing the modules that register methods, this package's own and those of other packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
from functools import cache

from twin_bench.errors import OUTDATED, InputError, first_line

OWN_PACKAGE = "twin_bench"
ENTRY_POINTS = f"{OWN_PACKAGE}.methods"
"""The group of entry points whose modules, or packages of modules, register methods."""

_log = logging.getLogger(__name__)


@cache
def load_methods() -> None:
    """Import every module that registers methods: those that entry points name, and the modules of named packages."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    own = [point for point in points if point.module.partition(".")[0] == OWN_PACKAGE]
    if not own:
        raise InputError(f"no merge method is registered: {OUTDATED}")
    for point in own:
        _load(point.module)
    for point in points:
        try:
            _load(point.module)
        except Exception as error:  # whatever another package's import raises, the methods here must keep working
            _log.warning(
                "the methods of %s (entry point %s) are left out: %s; repair or uninstall that package",
                point.value,
                point.name,
                first_line(error),
            )


def _load(name: str) -> None:
    """Import a module; of a package also its modules, but for private ones and `__main__`."""
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not found.name.startswith("_"):
            importlib.import_module(f"{name}.{found.name}")
