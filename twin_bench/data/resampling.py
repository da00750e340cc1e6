"""Metrics of many draws of rows at once: (samples, weights) -> (draws,).

samples (2, n) are references over answers. weights (draws, n) say how often each row is in each draw. A draw that holds
every row once gives the metric's value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Resampled = Callable[[Array, Array], Array]


def accuracy(samples: Array, weights: Array) -> Array:
    """Return the share of rows whose answer is the reference."""
    return np.asarray(weights @ (samples[0] == samples[1]) / weights.sum(axis=1))


def matthews(samples: Array, weights: Array) -> Array:
    """Return Matthews' correlation of any number of classes, 0 where a side holds one class alone."""
    classes = np.unique(samples)[:, None]
    true, predicted = (weights @ (samples[side] == classes).T for side in (0, 1))  # (draws, classes)
    rows = weights.sum(axis=1)
    covariance = rows * (weights @ (samples[0] == samples[1])) - (true * predicted).sum(axis=1)
    spread = (rows**2 - (true**2).sum(axis=1)) * (rows**2 - (predicted**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(spread))


def f1(samples: Array, weights: Array) -> Array:
    """Return the F1 of class 1, 0 where it occurs on neither side."""
    true, predicted = samples == 1
    return _ratio(2 * weights @ (true & predicted), weights @ true + weights @ predicted)


def accuracy_f1(samples: Array, weights: Array) -> Array:
    """Return the mean of `accuracy` and `f1`."""
    return (accuracy(samples, weights) + f1(samples, weights)) / 2


def pearson(samples: Array, weights: Array) -> Array:
    """Return Pearson's correlation, 0 where a side is constant."""
    return _correlation(samples[0], samples[1], weights)


def spearman(samples: Array, weights: Array) -> Array:
    """Return Spearman's correlation, 0 where a side is constant."""
    return _correlation(_ranks(samples[0], weights), _ranks(samples[1], weights), weights)


def pearson_spearman(samples: Array, weights: Array) -> Array:
    """Return the mean of `pearson` and `spearman`."""
    return (pearson(samples, weights) + spearman(samples, weights)) / 2


def _correlation(x: Array, y: Array, weights: Array) -> Array:
    """Return the correlation of x and y, each (n,) or (draws, n), in each draw: (draws,)."""
    x, y = _standardised(x), _standardised(y)

    def mean(values: Array) -> Array:
        return np.asarray((weights * values).mean(axis=1) / weights.mean(axis=1))

    mean_x, mean_y = mean(x), mean(y)
    spread_x, spread_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    # After standardising, a smaller spread is the rounding error of a draw of equal values.
    varies = np.minimum(spread_x, spread_y) > 1e-12
    return _ratio(mean(x * y) - mean_x * mean_y, np.sqrt(np.where(varies, spread_x * spread_y, 0)))


def _standardised(x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = x.std(axis=-1, keepdims=True)
    return np.where(np.ptp(x, axis=-1, keepdims=True) > 0, centred / np.where(deviation > 0, deviation, 1), 0.0)


def _ranks(x: Array, weights: Array) -> Array:
    """Return each value's average rank within each draw, (draws, n). A row that is drawn twice is a tie."""
    _, group = np.unique(x, return_inverse=True)
    counts = np.zeros((len(weights), group.max() + 1))
    np.add.at(counts.T, group, weights.T)
    return np.asarray((np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, group])


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)
