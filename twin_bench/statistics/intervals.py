"""Intervals of a score, a mean or a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from twin_bench.data.resampling import Array

LEVEL = 0.95


def percentile(draws: Array, level: float = LEVEL, *, rows: float | None = None) -> tuple[float, float]:
    """Return the percentile interval of a value from its draws (draws,), in their unit (Efron 1981).

    With `rows`, of how many rows (or clusters) the draws are, it holds for few of them as well: it is widened as
    Student's t interval is against the normal one, and by the sqrt(rows / (rows - 1)) by which the spread of draws is
    too small (the expanded percentile interval of Hesterberg 2015, "What teachers should know about the bootstrap").
    Draws that are NaN or infinite are left out. (nan, nan) if none is left, or of a single row.
    """
    known = draws[np.isfinite(draws)]
    if not len(known) or (rows is not None and rows < 2):
        return math.nan, math.nan
    tail = (1 - level) / 2
    if rows is not None:
        tail = float(stats.norm.cdf(-widened(float(stats.norm.ppf(1 - tail)), rows)))
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def effective_rows(variances: Sequence[float], rows: Sequence[float]) -> float:
    """Return of how many rows a sum is whose independent parts have these variances and are of so many rows each.

    It is one more than Welch and Satterthwaite's degrees of freedom, (sum v)^2 / sum(v^2 / (rows - 1)): a part of few
    rows counts as much as it contributes. Parts without variance do not count.
    """
    parts = [(variance, count) for variance, count in zip(variances, rows, strict=True) if variance > 0]
    if not parts:
        return max(rows, default=0)
    if any(count < 2 for _, count in parts):
        return 1.0
    return 1 + sum(variance for variance, _ in parts) ** 2 / sum(v**2 / (count - 1) for v, count in parts)


def widened(deviations: float, rows: float) -> float:
    """Return how many standard deviations of the draws stand for as many of a normal distribution's.

    They are more: by Student's t against the normal distribution, and by the sqrt(rows / (rows - 1)) by which draws of
    so many rows (or clusters) spread too little. Infinitely many for a single row.
    """
    if rows < 2:
        return math.inf
    return math.sqrt(rows / (rows - 1)) * float(stats.t.isf(stats.norm.sf(deviations), rows - 1))


def narrowed(deviations: float, rows: float) -> float:
    """Return the normal distribution's deviations that `widened` makes so many of: its inverse. 0 for a single row."""
    if rows < 2:
        return 0.0
    return float(stats.norm.isf(stats.t.sf(deviations / math.sqrt(rows / (rows - 1)), rows - 1)))


def wilson(successes: float, rows: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of a share, `successes` of `rows` independent rows, from 0 to 1 (Wilson 1927).

    It holds for few rows and for shares near 0 and 1, where draws of the rows say too little: draws of rows that are
    all right are all right. (nan, nan) of no rows.
    """
    if not rows:
        return math.nan, math.nan
    z, share = float(stats.norm.ppf((1 + level) / 2)), successes / rows
    centre, half = share + z**2 / (2 * rows), z * math.sqrt(share * (1 - share) / rows + (z / (2 * rows)) ** 2)
    low, high = ((centre + sign * half) / (1 + z**2 / rows) for sign in (-1, 1))
    return 0.0 if successes == 0 else low, 1.0 if successes == rows else high
