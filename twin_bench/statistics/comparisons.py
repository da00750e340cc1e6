"""Comparisons of methods whose scores are of the same draws of rows. Higher is better."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from twin_bench.data.resampling import Array
from twin_bench.statistics.intervals import LEVEL, narrowed, percentile, widened

_COUNTED = 10
"""So many draws beyond zero count a p. With fewer, it is that of a normal distribution."""
_ROUNDING = 1e-9
"""A difference that is less than this part of the values is the rounding error of equal values."""


@dataclass(frozen=True)
class Difference:
    """A difference with its interval, in the values' unit, and the two-sided p that there is none."""

    difference: float
    ci_low: float
    ci_high: float
    p: float


def difference(
    first_draws: Array,
    second_draws: Array,
    first: float,
    second: float,
    level: float = LEVEL,
    *,
    rows: float | None = None,
) -> Difference:
    """Return how far `first` is above `second`, two values of which the draws (draws,) are of the same rows.

    The interval is the percentile interval of the draws' differences. p is twice the share of the draws in which the
    difference is zero or on the other side of zero, where the estimate counts as one draw. Where fewer than ten draws
    are, it is that of the difference in standard deviations of the draws, if this is less. It is from 2 / (draws + 1)
    to 1. Draws in which either is NaN or infinite are left out. All is NaN if none is left or a value is NaN.

    With `rows`, of how many rows (or clusters) the draws are, both hold for few of them: the interval as in
    `percentile`, and p accordingly. Where all draws are alike, p is at least that of as many rows that all speak for
    one of the two (the sign test), and the interval is not known.
    """
    rounding = _ROUNDING * max(abs(first), abs(second))
    known = np.isfinite(first_draws) & np.isfinite(second_draws)
    drawn = first_draws[known] - second_draws[known]
    if not len(drawn) or math.isnan(rounding):
        return Difference(math.nan, math.nan, math.nan, math.nan)
    drawn = np.where(np.abs(drawn) <= rounding, 0, drawn)
    estimate = first - second if abs(first - second) > rounding else 0.0
    low, high = percentile(drawn, level, rows=rows)
    beyond, least = min(int((drawn <= 0).sum()), int((drawn >= 0).sum())), 2 / (len(drawn) + 1)
    p = min(1.0, least * (1 + beyond))
    alike = bool(np.ptp(drawn) <= rounding)
    if rows is not None and p < 1:
        deviations = float(stats.norm.isf(p / 2))
        if beyond < _COUNTED and not alike:
            deviations = max(deviations, abs(estimate) / float(np.std(drawn)))
        p = max(least, 2 * float(stats.norm.sf(narrowed(deviations, rows))))
        if alike:
            p, low, high = max(p, _sign_test(rows)), math.nan, math.nan
    return Difference(estimate, low, high, p)


def _sign_test(rows: float) -> float:
    """Return the two-sided p of so many rows that all speak for one of two methods."""
    return min(1.0, 2 * 0.5**rows)


def holm(p_values: Sequence[float] | Array) -> Array:
    """Return the p-values adjusted for how many they are, in the same order (Holm 1979).

    At most a share `a` of families of comparisons has an adjusted p of `a` or less where there is no difference. NaN
    stays NaN and does not count.
    """
    adjusted = np.array(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(adjusted))
    order = known[np.argsort(adjusted[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * adjusted[order]), 1)
    return adjusted


def rank_ranges(
    values: Sequence[float] | Array, draws: Array, level: float = LEVEL, *, rows: float | None = None
) -> list[tuple[int, int] | None]:
    """Return each method's best and worst rank, from 1: ranges that hold all true ranks at once with 95%.

    `values` (m,) are the methods' values and `draws` (draws, m) are of the same rows. All pairs are compared at once:
    each by the percentile interval of its difference, at the one level at which all of these hold together with 95%
    (Beran 1988, "Balanced simultaneous confidence sets"; the ranks as in Mogstad, Romano, Shaikh and Wilhelm 2024,
    "Inference for ranks with applications to mobility across neighborhoods and academic achievement").
    A method's best rank is 1 and one for each method that is above it for sure. Its worst rank is m less one for each
    that it is above for sure. A method without a value has no range (None) and does not count. `rows` is as in
    `difference`.
    """
    known, above = _above(values, draws, level, rows)
    ranges: list[tuple[int, int] | None] = [None] * len(values)
    for place, method in enumerate(known):
        ranges[method] = (1 + int(above[:, place].sum()), len(known) - int(above[place].sum()))
    return ranges


def tie_groups(
    values: Sequence[float] | Array, draws: Array, level: float = LEVEL, *, rows: float | None = None
) -> list[int | None]:
    """Return the number of each method's group, from 1: what can't be told apart from the group's best method.

    A group is the best of the methods that are left and those of them that it is not above for sure, by the comparisons
    of `rank_ranges`. So the first group holds the truly best method with 95%. Two methods of a group may differ for
    sure, if both are tied with its best. A method without a value has no group (None).
    """
    known, above = _above(values, draws, level, rows)
    groups: list[int | None] = [None] * len(values)
    left = sorted(range(len(known)), key=lambda place: -values[known[place]])
    number = 0
    while left:
        number += 1
        tied = [place for place in left if not above[left[0], place]]
        for place in tied:
            groups[known[place]] = number
        left = [place for place in left if place not in tied]
    return groups


def _above(values: Sequence[float] | Array, draws: Array, level: float, rows: float | None) -> tuple[list[int], Array]:
    """Return which methods have a value, k of them, and whether each is above each other for sure, (k, k).

    With `rows`, of how many rows (or clusters) the draws are, intervals are wider where they are few. A difference that
    all draws show alike counts if so many rows that all speak for one method would be enough.
    """
    estimates = np.asarray(values, dtype=np.float64)
    drawn = np.isfinite(draws)
    known = [int(one) for one in np.flatnonzero(np.isfinite(estimates) & (drawn.sum(axis=0) > 1))]
    estimates, draws = estimates[known], draws[drawn[:, known].all(axis=1)][:, known]
    rounding = _ROUNDING * np.abs(estimates).max(initial=0)
    alike_counts = rows is None or _sign_test(rows) <= 1 - level
    above = np.zeros((len(known), len(known)), dtype=bool)
    pairs: list[tuple[int, int, Array]] = []
    for one, other in itertools.combinations(range(len(known)) if len(draws) > 1 else (), 2):
        difference = draws[:, one] - draws[:, other]
        if np.ptp(difference) > rounding:
            pairs.append((one, other, np.sort(difference)))
        elif alike_counts and abs(estimates[one] - estimates[other]) > rounding:
            above[one, other] = estimates[one] > estimates[other]
            above[other, one] = not above[one, other]
    tail = _simultaneous_tail(draws, pairs, level, rows)
    for one, other, differences in pairs:
        low, high = np.quantile(differences, [tail, 1 - tail])
        above[one, other], above[other, one] = low > rounding, high < -rounding
    return known, above


def _simultaneous_tail(
    draws: Array, pairs: Sequence[tuple[int, int, Array]], level: float, rows: float | None
) -> float:
    """Return the tail of each pair's percentile interval at which all pairs' intervals hold together.

    In each draw, the pair whose difference lies furthest in its tails counts. Differences are compared by their place
    among all draws, and not by standard deviations, which a few draws of a small denominator would decide.
    """
    furthest = np.full(len(draws), 0.5)
    for one, other, differences in pairs:
        own = draws[:, one] - draws[:, other]
        below = np.searchsorted(differences, own, side="left") / len(own)
        above = 1 - np.searchsorted(differences, own, side="right") / len(own)
        # Equal differences stand for one place, in the middle of theirs.
        middle = below + (1 - below - above) / 2
        furthest = np.minimum(furthest, np.minimum(middle, 1 - middle))
    tail = float(np.quantile(furthest, 1 - level)) if len(pairs) else 0.5
    tail = max(tail, 0.5 / max(len(draws), 1))
    return tail if rows is None else float(stats.norm.sf(widened(float(stats.norm.isf(tail)), rows)))
