"""Intervals of a score, a mean or a difference."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from twin_bench.data.resampling import Array

LEVEL = 0.95


def percentile(draws: Array, level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval of a value from its draws (draws,), in their unit (Efron 1981).

    NaN draws are left out. (nan, nan) if none is left.
    """
    known = draws[~np.isnan(draws)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
