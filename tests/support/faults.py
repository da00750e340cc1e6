"""A process that is killed at one of its writes (its folder is copied after each of them), and a disk that is full."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def copied_at_each_write(folder: Path, into: Path) -> Iterator[list[Path]]:
    """Copy `folder` after each flush of a file and each rename within the block that changed what is there.

    The copies are what a dead process leaves: the locks on temporary files, whose writer lives, are not copied.
    """
    copies: list[Path] = []
    last: list[tuple[Path, int]] = []

    def then_copied(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            there = sorted((path, path.stat().st_size) for path in folder.rglob("*"))
            if there != last:
                last[:] = there
                copies.append(Path(shutil.copytree(folder, into / f"{len(copies):03d}")))
            return result

        return call

    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "rename"):
            patch.setattr(os, name, then_copied(getattr(os, name)))
        yield copies


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: writing then fails as on a full disk, with another number."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
