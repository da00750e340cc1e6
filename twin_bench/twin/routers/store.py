"""Routers on disk: in a twin directory, and kept from build to build under a key of what decides them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from twin_bench.checkpoints.peft_files import save_tensors
from twin_bench.errors import InputError
from twin_bench.files import digest, read_json, read_tensors, write_json, write_tensors
from twin_bench.locks import made_by_one
from twin_bench.twin.routers.base import Router, RouterConfig
from twin_bench.twin.routers.registry import find_kind

FORMAT = 4
"""The version of kept routers. It is raised with every change in how a router is chosen or fitted."""
FOLDER = "routers"
"""The folder of kept routers, in that of the features."""

_log = logging.getLogger(__name__)


def save_router(folder: Path, router: Router) -> None:
    """Write a router's config and tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(router.config))
    save_tensors(router.state_dict(), folder / "router.safetensors")


def load_router(folder: Path) -> Router | None:
    """Return the router in a folder, or None if there is none.

    A config of an older format has no kind, and is of an MLP. InputError that names the file for what is wrong.
    """
    if not (folder / "router.safetensors").is_file():
        return None
    file = folder / "config.json"
    try:
        config = _config(read_json(file))
        return find_kind(config.kind).router.restored(config, load_file(folder / "router.safetensors")).eval()
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _config(settings: Mapping[str, Any]) -> RouterConfig:
    lists = {name: tuple(settings[name]) for name in ("experts", "layers") if name in settings}
    return RouterConfig(**{**settings, **lists})


def kept_router(
    folder: Path | None, decisive: Mapping[str, Any], fit: Callable[[], tuple[Router, dict[str, Any]]]
) -> tuple[Router, dict[str, Any]]:
    """Return a fitted router and what is told about it. It is fitted unless `folder` holds it, and kept there.

    Another process that would fit the same router waits, and reads it.

    Args:
        folder: That of the features, or None to keep nothing.
        decisive: Everything that decides the router, as plain data.
        fit: Returns the router, and plain data.
    """
    if folder is None:
        return fit()
    file = folder / FOLDER / f"{digest({'format': FORMAT, **decisive})}.safetensors"
    with made_by_one(file):
        stored = read_tensors(file, format_number=FORMAT)
        if stored is not None:
            config = _config(json.loads(stored.notes["config"]))
            router = find_kind(config.kind).router.restored(config, dict(stored)).eval().requires_grad_(False)
            return router, json.loads(stored.notes["told"])
        router, told = fit()
        notes = {"config": json.dumps(asdict(router.config)), "told": json.dumps(told)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, router.state_dict(), format_number=FORMAT, notes=notes)
        except OSError as error:
            _log.warning("%s: the router can't be kept (%s)", file, error)
        return router, told
