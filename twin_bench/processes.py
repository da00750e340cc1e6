"""Processes that a command starts: they end when it does, and leave a Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def end_with_the_command() -> None:
    """Let this process, which a command has started, end when the command does, however that ends."""
    command = multiprocessing.parent_process()
    assert command is not None

    def wait() -> None:
        command.join()
        os._exit(1)

    threading.Thread(target=wait, name="twin-bench-command", daemon=True).start()


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Let no process that starts in the block hear a Ctrl-C, which a terminal sends to all: the command ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
