"""How a report writes numbers: with as many digits as can be read, and the unit beside them."""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeGuard

MISSING = "n/a"


def known(value: object) -> TypeGuard[float]:
    """Return whether there is a number: neither None nor NaN."""
    return isinstance(value, Real) and not math.isnan(value)


def points(value: float | None) -> str:
    """Return a score with one decimal, and with four digits from 1,000 on."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return "0.0" if text == "-0.0" else text


def score(value: float | None, *, percent: bool) -> str:
    """Return a task's score: in points, or with three significant digits if its metric is no fraction."""
    if percent or value is None or math.isnan(value):
        return points(value)
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def interval(value: float | None, low: float | None, high: float | None, *, percent: bool = True) -> str:
    """Return a value with its interval, `91.2 (89.0 to 93.1)`; the value alone where there is no interval."""
    text = score(value, percent=percent)
    if not (known(low) and known(high)):
        return text
    return f"{text} ({score(low, percent=percent)} to {score(high, percent=percent)})"


def difference(value: float, low: float | None = None, high: float | None = None) -> str:
    """Return a signed difference with its interval, `+1.8 (-0.6 to +4.2)`."""
    if not (known(low) and known(high)):
        return _signed(value)
    return f"{_signed(value)} ({_signed(low)} to {_signed(high)})"


def probability(p: float | None) -> str:
    """Return p with as many digits as decide."""
    if p is None or math.isnan(p):
        return MISSING
    return "below 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def group(tie_group: float | None, *, told: bool) -> str:
    """Return a tie group's letter, A for the leading one; those of methods that are told the task are small."""
    if not known(tie_group):
        return ""
    letter = chr(ord("A") + min(int(tie_group) - 1, 25))
    return letter.lower() if told else letter


def ranks(low: float | None, high: float | None) -> str:
    """Return a range of ranks, `1 to 4`, or one rank."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return MISSING
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def count(value: float | None) -> str:
    """Return a number of things, `1,000`."""
    return MISSING if value is None or math.isnan(value) else f"{value:,.0f}"


def times(value: float | None) -> str:
    """Return a ratio, `1.57 x`."""
    return MISSING if value is None or math.isnan(value) else f"{value:.3g} x"


def parameters(value: float | None) -> str:
    """Return a number of parameters, `22.7 M`."""
    return _scaled(value, 1000, ("", " K", " M", " B", " T"))


def size(value: float | None) -> str:
    """Return bytes, `86.9 MB`."""
    return _scaled(value, 1000, (" B", " kB", " MB", " GB", " TB"))


def duration(seconds: float | None) -> str:
    """Return a time in the unit that suits it, from microseconds to hours."""
    if seconds is None or math.isnan(seconds):
        return MISSING
    for below, factor, unit in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min")):
        if seconds < below:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds / 3600)} h"


def _signed(value: float) -> str:
    text = points(value)
    return text if text.startswith("-") or text in (MISSING, "0.0") else f"+{text}"


def _digits(value: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _scaled(value: float | None, step: int, units: tuple[str, ...]) -> str:
    if value is None or math.isnan(value):
        return MISSING
    rest, unit = float(value), 0
    while abs(rest) >= step and unit < len(units) - 1:
        rest, unit = rest / step, unit + 1
    return f"{rest:.0f}{units[0]}" if unit == 0 else f"{_digits(rest)}{units[unit]}"
