"""Metrics of many draws of rows at once.

A `Resampled` takes references (n,) and the answers of m models to the same rows, (m, n), or (m, n, labels) where a
metric takes probabilities. It sorts and groups these once, and returns a function of weights (n, draws), which say how
often each row is in each draw. That function returns the m models' values in each draw, (m, draws). A draw that holds
every row once gives the metric's value. A draw in which the metric is undefined gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[Any]
OfDraws = Callable[[Array], Array]
Resampled = Callable[[Array, Array], OfDraws]


class Counts:
    """How often each label is right, true and predicted in each draw: of a model's (reference, answer) cells.

    `labels` (labels, 1) are those that occur on either side. `right`, `true` and `predicted` are (labels, draws), and
    `rows` (draws,).
    """

    def __init__(self, cells: Array, counts: Array):
        """Of distinct cells (2, cells), references over answers, and how often each is in each draw, (cells, draws)."""
        self.labels = np.unique(cells)[:, None]
        true, predicted = (cells[side] == self.labels for side in (0, 1))
        self.true, self.predicted, self.right = true @ counts, predicted @ counts, (true & predicted) @ counts
        self.rows: Array = counts.sum(axis=0)

    def of(self, label: int) -> tuple[Array, Array, Array]:
        """Return how often a label is right, true and predicted in each draw, each (draws,)."""
        chosen = self.labels[:, 0] == label
        return self.right[chosen].sum(axis=0), self.true[chosen].sum(axis=0), self.predicted[chosen].sum(axis=0)


def of_counts(value: Callable[[Counts], Array]) -> Resampled:
    """Return a metric of labels, whose value depends on how often each (reference, answer) cell occurs alone."""

    def resampled(references: Array, answers: Array) -> OfDraws:
        tables = []
        for own in answers:
            cells, cell = np.unique(np.stack([references, own]), axis=1, return_inverse=True)
            tables.append((cells, _members(cell.reshape(-1))))
        return lambda weights: np.stack([value(Counts(cells, members @ weights)) for cells, members in tables])

    return resampled


def accuracy(references: Array, answers: Array) -> OfDraws:
    """Return the share of rows whose answer is the reference."""
    return mean((answers == references).astype(np.float64))


def mean(scores: Array) -> OfDraws:
    """Return the mean of the rows' scores (m, n)."""
    return lambda weights: scores @ weights / weights.sum(axis=0)


@of_counts
def matthews(counts: Counts) -> Array:
    """Return Matthews' correlation of any number of classes, 0 where a side holds one class alone."""
    rows, true, predicted = counts.rows, counts.true, counts.predicted
    covariance = rows * counts.right.sum(axis=0) - (true * predicted).sum(axis=0)
    spread = (rows**2 - (true**2).sum(axis=0)) * (rows**2 - (predicted**2).sum(axis=0))
    return _ratio(covariance, np.sqrt(spread))


@of_counts
def kappa(counts: Counts) -> Array:
    """Return Cohen's kappa, 0 where both sides hold one class alone."""
    chance = (counts.true * counts.predicted).sum(axis=0)
    return _ratio(counts.rows * counts.right.sum(axis=0) - chance, counts.rows**2 - chance)


@of_counts
def precision(counts: Counts) -> Array:
    """Return the precision of class 1, 0 where it is not predicted."""
    right, _, predicted = counts.of(1)
    return _ratio(right, predicted)


@of_counts
def recall(counts: Counts) -> Array:
    """Return the recall of class 1, 0 where it does not occur."""
    right, true, _ = counts.of(1)
    return _ratio(right, true)


@of_counts
def f1(counts: Counts) -> Array:
    """Return the F1 of class 1, 0 where it occurs on neither side."""
    right, true, predicted = counts.of(1)
    return _ratio(2 * right, true + predicted)


@of_counts
def accuracy_f1(counts: Counts) -> Array:
    """Return the mean of accuracy and of the F1 of class 1."""
    right, true, predicted = counts.of(1)
    return (counts.right.sum(axis=0) / counts.rows + _ratio(2 * right, true + predicted)) / 2


@of_counts
def f1_macro(counts: Counts) -> Array:
    """Return the mean F1 of the labels that occur on either side. A negative answer is no label."""
    occurs = (counts.labels >= 0) & (counts.true + counts.predicted > 0)
    return _ratio(_f1_of_labels(counts).sum(axis=0), occurs.sum(axis=0))


@of_counts
def f1_weighted(counts: Counts) -> Array:
    """Return the mean F1 of the labels, weighted by how often each is the reference."""
    true = counts.true * (counts.labels >= 0)
    return _ratio((true * _f1_of_labels(counts)).sum(axis=0), true.sum(axis=0))


@of_counts
def balanced_accuracy(counts: Counts) -> Array:
    """Return the mean recall of the labels that the references have."""
    return _ratio(_ratio(counts.right, counts.true).sum(axis=0), (counts.true > 0).sum(axis=0))


def mean_squared_error(references: Array, answers: Array) -> OfDraws:
    """Return the mean squared error."""
    return mean((answers - references) ** 2)


def root_mean_squared_error(references: Array, answers: Array) -> OfDraws:
    """Return the root of the mean squared error."""
    squared = mean_squared_error(references, answers)
    return lambda weights: np.sqrt(squared(weights))


def mean_absolute_error(references: Array, answers: Array) -> OfDraws:
    """Return the mean absolute error."""
    return mean(np.abs(answers - references))


def r2(references: Array, answers: Array) -> OfDraws:
    """Return the coefficient of determination; of constant references 1 if all is right, and else 0."""
    squared = mean_squared_error(references, answers)
    scale, centred = references.std(), _standardised(references)
    moments = mean(np.stack([centred, centred**2]))

    def of_draws(weights: Array) -> Array:
        error = squared(weights)
        first, second = moments(weights)
        spread = np.where(_varies(second - first**2), scale**2 * (second - first**2), 0)
        known = 1 - np.divide(error, spread, out=np.ones_like(error), where=spread > 0)
        return np.where((spread == 0) & (error == 0), 1.0, known)

    return of_draws


def pearson(references: Array, answers: Array) -> OfDraws:
    """Return Pearson's correlation, 0 where a side is constant."""
    x, y = _standardised(references), _standardised(answers)
    moments = mean(np.concatenate([[x, x**2], y, y**2, x * y]))

    def of_draws(weights: Array) -> Array:
        found = moments(weights)
        mean_x, square_x = found[0], found[1]
        mean_y, square_y, product = found[2:].reshape(3, len(y), -1)
        spread_x, spread_y = square_x - mean_x**2, square_y - mean_y**2
        spread = np.where(_varies(np.minimum(spread_x, spread_y)), spread_x * spread_y, 0)
        return _ratio(product - mean_x * mean_y, np.sqrt(spread))

    return of_draws


def spearman(references: Array, answers: Array) -> OfDraws:
    """Return Spearman's correlation, 0 where a side is constant. A row that is drawn twice is a tie."""
    own, theirs = _members(references), [_members(one) for one in answers]

    def of_draws(weights: Array) -> Array:
        rows, counts = weights.sum(axis=0), own @ weights
        # A value's rank is the mean of its rows' places; the ranks of a draw are here less their own mean.
        ranks = np.cumsum(counts, axis=0) - counts / 2 - rows / 2
        ranked, spread = weights * (own.T @ ranks), _spread_of_ranks(counts, rows)

        def correlation(groups: sparse.csr_array) -> Array:
            counts, of_value = groups @ weights, groups @ ranked  # of_value sums to 0 over the values
            covariance = _dot(of_value, np.cumsum(counts, axis=0)) - _dot(of_value, counts) / 2
            return _ratio(covariance, np.sqrt(spread * _spread_of_ranks(counts, rows)))

        return np.stack([correlation(groups) for groups in theirs])

    return of_draws


def pearson_spearman(references: Array, answers: Array) -> OfDraws:
    """Return the mean of `pearson` and `spearman`."""
    first, second = pearson(references, answers), spearman(references, answers)
    return lambda weights: (first(weights) + second(weights)) / 2


def one_versus_rest(area: Callable[[Array, Array], Array]) -> Resampled:
    """Return an area of class 1's probability; of more labels, its mean over those that the draw's references have.

    `area` takes how often the rows of the class, and how often the others, have each probability in each draw, from the
    lowest, each (probabilities, draws). It returns the area (draws,). A draw of a single label is undefined.
    """

    def resampled(references: Array, answers: Array) -> OfDraws:
        labels = np.unique(references)
        classes = [label for label in labels if label == 1] if answers.shape[2] == 2 else list(labels)
        groups = [[_members(own[:, label]) for label in classes] for own in answers]
        which = references == labels[:, None]  # (labels, n)

        def of_draws(weights: Array) -> Array:
            present = which @ weights > 0  # (labels, draws)
            values = np.zeros((len(groups), weights.shape[1]))
            for own, value in zip(groups, values, strict=True):
                for label, members in zip(classes, own, strict=True):
                    of_class = members @ (weights * (references == label)[:, None])
                    value += np.where(present[labels == label][0], area(of_class, members @ weights - of_class), 0)
            counted = present[np.isin(labels, classes)].sum(axis=0)
            return np.where(present.sum(axis=0) > 1, values / np.maximum(counted, 1), np.nan)

        return of_draws

    return resampled


@one_versus_rest
def auroc(positive: Array, negative: Array) -> Array:
    """Return the area under the ROC curve: how often a row of the class is above another, a tie half."""
    above = np.cumsum(negative, axis=0) - negative / 2
    return _ratio((positive * above).sum(axis=0), positive.sum(axis=0) * negative.sum(axis=0))


@one_versus_rest
def average_precision(positive: Array, negative: Array) -> Array:
    """Return the mean, over the rows of the class, of the precision where all rows at or above each are predicted."""
    found, both = (np.cumsum(part[::-1], axis=0)[::-1] for part in (positive, positive + negative))
    return _ratio((positive * _ratio(found, both)).sum(axis=0), positive.sum(axis=0))


def _f1_of_labels(counts: Counts) -> Array:
    return np.asarray(_ratio(2 * counts.right, counts.true + counts.predicted) * (counts.labels >= 0))


def _members(values: Array) -> sparse.csr_array:
    """Return which rows have each distinct value, from the lowest: (values, n), one where a row has it."""
    distinct, group = np.unique(values, return_inverse=True)
    rows = len(values)
    return sparse.csr_array((np.ones(rows), (group, np.arange(rows))), shape=(len(distinct), rows))


def _spread_of_ranks(counts: Array, rows: Array) -> Array:
    """Return the sum, over a draw's rows, of the squared rank less the mean rank: (rows^3 - sum counts^3) / 12."""
    return np.asarray((rows**3 - np.einsum("vd,vd,vd->d", counts, counts, counts)) / 12)


def _dot(first: Array, second: Array) -> Array:
    """Return the sum of the products over the values, (draws,)."""
    return np.einsum("vd,vd->d", first, second)


def _standardised(x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = x.std(axis=-1, keepdims=True)
    return np.where(np.ptp(x, axis=-1, keepdims=True) > 0, centred / np.where(deviation > 0, deviation, 1), 0.0)


def _varies(spread: Array) -> Array:
    """Return where the spread of standardised values is more than the rounding error of a draw of equal values."""
    return np.asarray(spread > 1e-12)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Return the ratio, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros(denominator.shape), where=denominator > 0)
