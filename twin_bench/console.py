"""How a command ends and what it shows: exit statuses, one line for an error, progress bars."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from twin_bench.errors import InputError, one_line

if TYPE_CHECKING:
    from types import FrameType

    from rich.progress import Progress


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, which `twin_bench.twin.device` reads."""
    parser.add_argument(
        "--device",
        default="auto",
        help="where models run: cpu, cuda, cuda:1, mps, or auto: cuda, else mps, else cpu (default: auto)",
    )


def progress_bars(options: argparse.Namespace) -> Progress:
    """Return progress bars on stderr, which show nothing under --quiet."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), disable=options.quiet)


def reporting_errors(run: Callable[[], None]) -> int:
    """Run a command; return 0, 2 after an InputError or an OSError (one line on stderr), or 130 after an interrupt."""
    with _interruptible_imports():
        try:
            run()
            sys.stdout.flush()
        except InputError as error:
            return _report(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            named = error.filename is not None and error.strerror is not None
            return _report(one_line(f"{error.filename}: {error.strerror}" if named else str(error)))
    return 0


@contextmanager
def _interruptible_imports() -> Iterator[None]:
    """Let Ctrl-C end the process at once, with status 130, while a module is being imported.

    A KeyboardInterrupt would not do: numpy swallows one in its import and fails later, and torch's import aborts.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
                print(f"{shown}interrupted", file=sys.stderr, flush=True)
                os._exit(130)
            frame = frame.f_back
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()  # only this one may set a handler
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _report(message: str) -> int:
    """Print one line on stderr, and with -vv where it was raised; return 2."""
    import logging

    print(f"error: {message}", file=sys.stderr)
    logging.getLogger(__name__).debug("where the error was raised:", exc_info=True)
    return 2
