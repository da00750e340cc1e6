"""The tasks' metrics and their standard errors.

GLUE's `score` and `standard_error` are in points: from 0 to 100, and down to -100 for the correlations. Scores are
those of scikit-learn and scipy. Bootstrapped errors compute the same metrics for all draws at once, from counts.

A class is any integer. Under the routed protocol an answer may be no label of the task, because the chosen head lacks
it. Such an answer counts as a class of its own that never equals a reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Array = NDArray[np.float64]


def score(metric: str, references: Sequence[float], predictions: Sequence[float]) -> float:
    """Return the score in points.

    `metric` is `mcc` (Matthews correlation, any number of classes), `acc`, `acc_f1` (mean of accuracy and the F1 of
    class 1) or `pearson_spearman` (mean of the two correlations). `references` holds a label for each row.
    `predictions` holds a predicted class, or a number for `pearson_spearman`.

    A correlation (Matthews' too) with constant references or predictions is 0, not NaN. The F1 of a class that occurs
    in neither list is 0 too. Raises ValueError for an unknown metric, no rows, lists of different lengths, or numbers
    that are not finite.
    """
    references_, predictions_ = _prepare(metric, references, predictions)
    return float(100 * _SCORES[metric](references_, predictions_))


def standard_error(
    metric: str,
    references: Sequence[float],
    predictions: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> float:
    """Return the standard error of `score` over draws of the rows, in the same points.

    Accuracy has the closed form sqrt(p (1 - p) / (n - 1)). The other metrics are bootstrapped: the error is the
    standard deviation of the score over `resamples` draws of n rows with replacement. It is the same for the same
    `seed` and rows, in whatever order these come. A single row gives 0. Arguments and errors are those of `score`.
    """
    samples = _prepare(metric, references, predictions)
    rows = samples.shape[1]
    if rows == 1:
        return 0.0
    if metric == "acc":
        accuracy = float(np.mean(samples[0] == samples[1]))
        return float(100 * np.sqrt(accuracy * (1 - accuracy) / (rows - 1)))
    rng = np.random.default_rng(seed)
    samples = samples[:, np.lexsort(samples)]  # the draws must not depend on the rows' order
    if metric == "pearson_spearman":
        weights = rng.multinomial(rows, np.full(rows, 1 / rows), size=resamples)
    else:
        # A draw of rows is a draw of (reference, prediction) cells, and there are only a few distinct ones.
        samples, counts = np.unique(samples, axis=1, return_counts=True)
        weights = rng.multinomial(rows, counts / rows, size=resamples)
    return float(100 * np.std(RESAMPLED[metric](samples, weights.astype(np.float64)), ddof=1))


def rouge_2(reference: str, prediction: str) -> float:
    """Return ROUGE-2 as HELM computes it: the F1 of shared bigrams, 0 to 1, words stemmed (Lin 2004; rouge-score)."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge2"], use_stemmer=True)
    return float(scorer.score(reference, prediction)["rouge2"].fmeasure)


def mean(values: Sequence[float]) -> float:
    """Return the mean of the rows' scores, the same for any order of the rows."""
    return math.fsum(values) / len(values)


def mean_standard_error(values: Sequence[float]) -> float:
    """Return the standard error of `mean` over draws of the rows: s / sqrt(n). A single row gives 0."""
    sample = np.sort(np.asarray(values, dtype=np.float64))
    return 0.0 if len(sample) < 2 else float(sample.std(ddof=1) / np.sqrt(len(sample)))


def _prepare(metric: str, references: Sequence[float], predictions: Sequence[float]) -> Array:
    """Return (2, n): references over predictions. Raises ValueError for input that no metric is defined for."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
    if len(references) != len(predictions) or len(references) == 0:
        raise ValueError(f"{metric} of {len(references)} references and {len(predictions)} predictions")
    samples = np.asarray([references, predictions], dtype=np.float64)
    if not np.isfinite(samples).all():
        raise ValueError(f"{metric}: references and predictions must be finite")
    return samples


def _matthews_correlation(references: Array, predictions: Array) -> float:
    if len(np.unique([references, predictions])) < 2:
        return 0.0  # scikit-learn returns 0 too, with a warning
    return float(matthews_corrcoef(references, predictions))


def _mean_of_accuracy_and_f1(references: Array, predictions: Array) -> float:
    f1 = f1_score(references == 1, predictions == 1, zero_division=0.0)
    return (float(accuracy_score(references, predictions)) + float(f1)) / 2


def _mean_of_correlations(references: Array, predictions: Array) -> float:
    if len(references) < 2 or np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0  # scipy returns NaN
    return float(pearsonr(references, predictions).statistic + spearmanr(references, predictions).statistic) / 2


_SCORES: dict[str, Callable[[Array, Array], float]] = {
    "mcc": _matthews_correlation,
    "acc": accuracy_score,
    "acc_f1": _mean_of_accuracy_and_f1,
    "pearson_spearman": _mean_of_correlations,
}
METRICS: tuple[str, ...] = tuple(_SCORES)

Resampled = Callable[[Array, Array], Array]
"""A metric of all draws at once: (samples, weights) -> (draws,).

samples (2, n) are references over predictions. weights (draws, n) say how often each row is in each draw.
"""


def _accuracy(samples: Array, weights: Array) -> Array:
    return np.asarray(weights @ (samples[0] == samples[1]) / weights.sum(axis=1))


def _matthews(samples: Array, weights: Array) -> Array:
    classes = np.unique(samples)[:, None]
    true, predicted = (weights @ (samples[side] == classes).T for side in (0, 1))  # (draws, classes)
    rows = weights.sum(axis=1)
    covariance = rows * (weights @ (samples[0] == samples[1])) - (true * predicted).sum(axis=1)
    spread = (rows**2 - (true**2).sum(axis=1)) * (rows**2 - (predicted**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(spread))


def _f1(samples: Array, weights: Array) -> Array:
    true, predicted = samples == 1
    return _ratio(2 * weights @ (true & predicted), weights @ true + weights @ predicted)


def _accuracy_f1(samples: Array, weights: Array) -> Array:
    return (_accuracy(samples, weights) + _f1(samples, weights)) / 2


def _pearson_spearman(samples: Array, weights: Array) -> Array:
    x, y = samples
    pearson = _pearson(x, y, weights)
    spearman = _pearson(_ranks(x, weights), _ranks(y, weights), weights)
    return (pearson + spearman) / 2


def _pearson(x: Array, y: Array, weights: Array) -> Array:
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


RESAMPLED: dict[str, Resampled] = {
    "mcc": _matthews,
    "acc": _accuracy,
    "acc_f1": _accuracy_f1,
    "pearson_spearman": _pearson_spearman,
}
"""Each metric of all draws at once. A draw that holds every row once gives the metric's score."""
