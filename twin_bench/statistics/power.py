"""What difference between two methods so many rows can show."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import optimize, stats

POWER = 0.8
LEVEL = 0.95
DISCORDANT = 0.1
"""The assumed share of rows that one of two methods gets right and the other does not."""


def detectable_difference(
    rows: int, discordant: float = DISCORDANT, *, level: float = LEVEL, power: float = POWER
) -> float:
    """Return the least difference of two accuracies, from 0 to 1, that the same `rows` show with this power.

    `discordant` is the assumed share of rows on which one of the two methods is right and the other is wrong. A
    difference can't be larger, so where it would be, all discordant rows are taken to speak for one method. It solves
    sqrt(rows) d = z_level sqrt(discordant) + z_power sqrt(discordant - d^2), the power of McNemar's test (Miettinen
    1968; Connor 1987, "Sample size for testing differences in proportions for the paired-sample design"). 1 if the rows
    are too few to show any.
    """
    z_level, z_power = _quantiles(level, power)

    def excess(found: float) -> float:
        share = max(discordant, found)
        return math.sqrt(rows) * found - z_level * math.sqrt(share) - z_power * math.sqrt(share - found**2)

    return 1.0 if excess(1.0) <= 0 else float(optimize.brentq(excess, 0.0, 1.0))


def detectable_mean_difference(
    rows: Sequence[int],
    discordant: float = DISCORDANT,
    *,
    expert: float = 1.0,
    level: float = LEVEL,
    power: float = POWER,
) -> float:
    """Return the least difference of two normalized means, in points, that tasks of so many `rows` show.

    A normalized mean is the mean over the tasks of 100 score / expert. It is assumed that scores are accuracies, that
    two methods are discordant on the share `discordant` of each task's rows, and that experts have the accuracy
    `expert`. The difference is (z_level + z_power) times its standard error, which is
    100 / expert sqrt(sum_t discordant / rows_t) / T.
    """
    error = 100 / expert * math.sqrt(sum(discordant / count for count in rows)) / len(rows)
    return sum(_quantiles(level, power)) * error


def _quantiles(level: float, power: float) -> tuple[float, float]:
    return float(stats.norm.ppf((1 + level) / 2)), float(stats.norm.ppf(power))
