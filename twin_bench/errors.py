"""The errors a user's mistake raises."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")

OUTDATED = "the installation is older than the code; install twin-bench again (pip install -e . in a checkout)"
"""What to say where an entry point of twin-bench's own is missing."""


LONGEST = 2000
"""The largest number of characters in a message."""


class InputError(ValueError):
    """Bad input: the message is one line that names the file, key or tensor and the remedy.

    Whatever names and values are in the message, it is made fit to be printed: see `one_line`. Command lines print it
    to stderr, without a traceback, and exit with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class UnsuitedError(InputError):
    """A method was asked of experts or tasks that lack what it needs: a leaderboard skips it and says why."""


class NotFiniteError(InputError):
    """What was computed holds NaN or inf: a merged tensor, or some rows' logits.

    A leaderboard skips the method and says why. A harness sets the rows aside, and answers the others.
    """


class RefusedError(InputError):
    """One request that can't be answered. Others can: a harness sets this one aside, with the message as its reason."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? known: a, b"`` for an unknown `name`, ready to end a message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(names) or 'none'}"


def named(name: object, known: Mapping[str, Value], kind: str, hint: str = "") -> Value:
    """Return what has a name. InputError for an unknown one, or what is no text: it suggests the nearest name.

    Args:
        name: the name that is asked for.
        known: what there is, by name.
        kind: what it is, in the message.
        hint: the message's end.
    """
    if not isinstance(name, str) or name not in known:
        raise InputError(f"unknown {kind} {shown(name)}{nearest(str(name), known)}{hint}")
    return known[name]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def one_line(text: str) -> str:
    """Return a message as one line of at most `LONGEST` characters, which a terminal can show.

    The middle of a longer message is left out: its beginning says where the error is, and its end says what to do.
    Line breaks become spaces. Control characters and other characters that can't be seen are escaped.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 5 :]}"
    line = re.sub(r"\s*[\r\n]\s*", " ", text.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def shown(value: Any) -> str:
    """Return a value as a message shows it: its repr in one line, of which the middle is left out if it is long."""
    text = one_line(_SHORT.repr(value))
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        """Return an integer's repr. Python writes none of over 4,300 digits."""
        return repr(x) if x.bit_length() < 128 else f"<an integer of {x.bit_length()} bits>"


_SHORT = _Short()
