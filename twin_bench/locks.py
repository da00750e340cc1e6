"""Locks: what one process does at a time. The system frees them when a process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twin_bench.errors import InputError


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file in the block. The file is made, and stays. Another process waits until the block ends.

    The system frees the lock when the process ends, however it ends. On a file system without locks nobody waits.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what is open for writing
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def made_by_one(path: Path) -> Iterator[None]:
    """Hold the lock under which `path` is made. Another process that would make it waits, and then finds it.

    The lock is a hidden file beside `path`, which stays. Where it can't be written nobody waits.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(locked(path.with_name(f".{path.name}.lock")))
        yield


@contextmanager
def written_by_one(directory: Path) -> Iterator[None]:
    """Hold the right to write `directory` in the block. InputError where another process, or block, holds it.

    The lock is on a hidden file beside it, which is removed at the end, as are folders that were made for it and are
    empty then. What a killed process has left is taken, also another user's. Without locks nobody is refused.
    """
    file, named = directory.with_name(f".{directory.name}.twin-bench-writer"), False
    missing = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        for folder in reversed(missing):
            held.callback(_if_it_can, folder.rmdir)
        while not named:
            held.callback(os.close, handle := _opened(file))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{directory}: another process writes it now; wait, or give another name") from None
            except OSError:
                pass
            named = os.fstat(handle).st_nlink > 0  # not the file that the last writer has just removed
        held.callback(_if_it_can, file.unlink)
        yield


def _opened(file: Path) -> int:
    """Open a lock's file, which is made if necessary. InputError where it is another user's and can't be read."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # NFS alone locks only what is open for writing
        with contextlib.suppress(OSError):
            return os.open(file, os.O_RDONLY)
        raise InputError(f"{file}: can't be opened; remove it if nobody writes there, or give another name") from None


def _if_it_can(remove: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        remove()
