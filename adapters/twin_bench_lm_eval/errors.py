"""User errors on lm-eval's command line: they end in one line and not in a traceback."""

from __future__ import annotations

import sys
from types import TracebackType

from twin_bench.errors import InputError


def one_line_errors() -> None:
    """On lm-eval's command line, print only an InputError's message and exit with status 2.

    In any other program this function does nothing, and the caller handles the exception. lm-eval catches no exceptions
    and has no hook for them, so `sys.excepthook` is replaced.
    """
    # Both the lm_eval script and `python -m lm_eval` have this name.
    on_command_line = hasattr(sys.modules["__main__"], "cli_evaluate")
    if on_command_line and sys.excepthook is not _one_line:
        global _previous
        _previous = sys.excepthook
        sys.excepthook = _one_line


_previous = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not isinstance(error, InputError):
        _previous(kind, error, traceback)
        return
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)  # a SystemExit raised in an excepthook sets the interpreter's exit status
