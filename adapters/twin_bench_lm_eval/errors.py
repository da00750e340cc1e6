"""How a user's mistake ends on lm-eval's command line."""

from __future__ import annotations

import sys
from types import TracebackType

from twin_bench.errors import InputError


def one_line_errors() -> None:
    """On lm-eval's command line, let an InputError end in its message and status 2, not in a traceback.

    Does nothing in any other program, where the exception is the caller's. lm-eval catches nothing on the
    way and offers no place of its own for this, so it is done where uncaught exceptions end.
    """
    # True of the lm_eval script and of `python -m lm_eval` alike.
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
    sys.exit(2)  # the interpreter takes its status from a SystemExit raised here
