"""How a command ends and what it shows: exit statuses, one line for an error, progress bars."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from twin_bench.errors import InputError, one_line

if TYPE_CHECKING:
    from types import FrameType

    from rich.progress import Progress


def add_device(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """Add --device, which `twin_bench.twin.device` reads. A `default` of None leaves the choice to a file."""
    parser.add_argument(
        "--device",
        default=default,
        help="where models run: cpu, cuda, cuda:1, mps, or auto: cuda, else mps, else cpu "
        f"(default: {default or 'what the file says, or auto'})",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, which takes the place of what a file says."""
    parser.add_argument(
        "--dtype",
        help="what is computed in: float32, bfloat16 or float16 (default: what the file says, or the model's)",
    )


def add_batch_size(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --batch-size, a number of rows in a forward pass. `default` says in words what happens without it."""
    parser.add_argument(
        "--batch-size", metavar="N", type=positive, help=f"rows in a forward pass, at most (default: {default})"
    )


def positive(text: str) -> int:
    """Return the positive whole number that an argument's text is; argparse's error for any other text."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_plugins(parser: argparse.ArgumentParser) -> None:
    """Add --plugin, which `twin_bench.merging.plugins.load_plugins` reads."""
    parser.add_argument(
        "--plugin",
        metavar="FILE",
        action="append",
        default=[],
        help="a Python file that registers merge methods or metrics; it is imported. May be given several times",
    )


def progress_bars(options: argparse.Namespace) -> Progress:
    """Return progress bars on stderr, which show nothing under --quiet."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=Console(stderr=True), disable=options.quiet)


class Terminated(BaseException):
    """The process was asked to end (SIGTERM). Like an interrupt, it lets every block clean up behind it."""


ENDINGS: dict[int, tuple[type[BaseException], str, int]] = {
    signal.SIGINT: (KeyboardInterrupt, "interrupted", 130),
    signal.SIGTERM: (Terminated, "terminated", 143),
}
"""What a signal raises, the line that says so, and the exit status."""


def reporting_errors(run: Callable[[], None]) -> int:
    """Run a command; return its exit status.

    It is 0, 2 after an InputError or an OSError (one line on stderr), 130 after an interrupt, or 143 after SIGTERM.
    """
    with _signals_end_the_command():
        try:
            run()
            sys.stdout.flush()
        except InputError as error:
            return _report(str(error))
        except (KeyboardInterrupt, Terminated) as ended:
            said, status = next((said, status) for kind, said, status in ENDINGS.values() if isinstance(ended, kind))
            print(said, file=sys.stderr)
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            named = error.filename is not None and error.strerror is not None
            return _report(one_line(f"{error.filename}: {error.strerror}" if named else str(error)))
    return 0


@contextmanager
def _signals_end_the_command() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise what ENDINGS say, or end the process at once while a module is being imported.

    An exception would not do there: numpy swallows one in its import and fails later, and torch's import aborts.
    """

    def end(number: int, frame: FrameType | None) -> None:
        kind, said, status = ENDINGS[number]
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides the cursor
                print(f"{shown}{said}", file=sys.stderr, flush=True)
                os._exit(status)
            frame = frame.f_back
        raise kind

    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main_thread = threading.current_thread() is threading.main_thread()  # only this one may set a handler
    mine = [number for number, handler in usual.items() if main_thread and signal.getsignal(number) is handler]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, usual[number])


def _report(message: str) -> int:
    """Print one line on stderr, and with -vv where it was raised; return 2."""
    import logging

    print(f"error: {message}", file=sys.stderr)
    logging.getLogger(__name__).debug("where the error was raised:", exc_info=True)
    return 2
