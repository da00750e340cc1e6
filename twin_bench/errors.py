"""The errors a user's mistake raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OUTDATED = "the installation is older than the code; install twin-bench again (pip install -e . in a checkout)"
"""What to say where an entry point of twin-bench's own is missing."""


class InputError(ValueError):
    """Bad input: the message is one line that names the file, key or tensor and the remedy.

    Command lines print the message to stderr, without a traceback, and exit with status 2.
    """


class UnsuitedError(InputError):
    """A method was asked of experts or tasks that lack what it needs: a leaderboard skips it and says why."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? known: a, b"`` for an unknown `name`, ready to end a message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(names) or 'none'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
