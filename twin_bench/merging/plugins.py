"""Importing the modules that register methods: this package's own, those of other packages, and a user's files.

A user's file may register methods (`twin_bench.merge_method`) and metrics (`twin_bench.metric`). A plugin is code that
runs. It is imported because a command or a recipe names it, and never from a model's folder.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import model_validator

from twin_bench.config import Settings
from twin_bench.errors import OUTDATED, InputError, first_line
from twin_bench.files import OWN_PACKAGE

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
        load_package(point.module)
    for point in points:
        try:
            load_package(point.module)
        except Exception as error:  # whatever another package's import raises, the methods here must keep working
            _log.warning(
                "the methods of %s (entry point %s) are left out: %s; repair or uninstall that package",
                point.value,
                point.name,
                first_line(error),
            )


def load_package(name: str) -> None:
    """Import a module; of a package also its modules, but for private ones and `__main__`.

    So files that register something are found by themselves.
    """
    module = importlib.import_module(name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not found.name.startswith("_"):
            importlib.import_module(f"{name}.{found.name}")


class WithPlugins(Settings):
    """Settings that may name plugins: Python files, which are imported before the other settings are read."""

    plugins: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _imported(cls, raw: Any) -> Any:
        named = raw.get("plugins") if isinstance(raw, dict) else None
        if isinstance(named, list | tuple) and all(isinstance(file, str) for file in named):
            load_plugins(named)
        return raw


def load_plugins(files: Iterable[str | Path]) -> None:
    """Import Python files that register methods or metrics. A file that has changed since is imported again.

    Raises:
        InputError: a file that is not there, can't be imported, or registers a name that another method or metric has.
    """
    load_methods()  # so that a name that is taken is the plugin's error
    for file in files:
        _load_file(Path(file).resolve())


def loaded_plugins() -> list[str]:
    """Return the files that `load_plugins` has imported, in the order in which they were."""
    return [str(sys.modules[name].__file__) for name in _CONTENTS]


_CONTENTS: dict[str, bytes] = {}
"""What was imported, by the names of the modules."""


def _load_file(file: Path) -> None:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"plugin {file}: {error.strerror}; name a Python file that can be read") from None
    name = f"twin_bench_plugin_{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    if _CONTENTS.get(name) == content:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"plugin {file}: no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"plugin {file}: can't be imported: {said}") from error
    _CONTENTS[name] = content
