"""The metrics by name, and how one of your own is registered.

Scores are those of scikit-learn and scipy. `score` and `standard_error` are in points: a metric that is a fraction or a
correlation is shown times 100.

A label is any integer. Under the routed protocol an answer may be no label of the task (-1), because the chosen head
lacks it. Such an answer is wrong: it counts as a class of its own that never equals a reference.

A correlation (Matthews' and Cohen's kappa too) of constant references or answers is 0, not NaN. Precision, recall and
F1 of a class that does not occur are 0 too.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from twin_bench.data import resampling
from twin_bench.data.metric import Answers, Function, Metric
from twin_bench.data.resampling import Array
from twin_bench.errors import InputError, first_line, nearest, shown

REGISTRY: dict[str, Metric] = {}
_ALIASES = {"accuracy": "acc", "balanced_accuracy": "balanced_acc"}
METRICS: Mapping[str, Metric] = MappingProxyType(REGISTRY)
"""The registered metrics by name: those below, and what plugins have added."""


def metric(
    *, answers: Answers = "label", higher_is_better: bool = True, percent: bool = True, labels: int | None = None
) -> Callable[[Function], Function]:
    """Register the decorated function (references, answers) -> value as the metric of its own name: see `Metric`."""

    def decorate(function: Function) -> Function:
        _register(Metric(function.__name__, function, answers, higher_is_better, percent, labels=labels))
        return function

    return decorate


def find_metric(name: str) -> Metric:
    """Return the metric of a name: a registered one, an alias, or `package.module.function`, which is imported.

    The answers of an imported function are labels, unless it is registered. Raises InputError that says what is wrong.
    """
    if not isinstance(name, str):
        raise InputError(f"a metric has a name, not {shown(name)}")
    known = REGISTRY.get(_ALIASES.get(name, name))
    if known is not None:
        return known
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise InputError(f"unknown metric {shown(name)}{nearest(name, {*REGISTRY, *_ALIASES})}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the import of another package raises
        said = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"metric {name}: {module_name} can't be imported: {said}; install its package") from error
    if not hasattr(module, attribute):
        functions = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        raise InputError(f"metric {name}: {module_name} has no {attribute!r}{nearest(attribute, functions)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(f"metric {name} is {shown(function)}; name a function (references, answers) -> number")
    registered = (one for one in REGISTRY.values() if one.function is function)
    return next(registered, Metric(name, function))


def score(metric: str, references: Sequence[float], answers: Sequence[Any]) -> float:
    """Return the score of the metric of a name: see `Metric.score`."""
    return find_metric(metric).score(references, answers)


def standard_error(
    metric: str, references: Sequence[float], answers: Sequence[Any], *, seed: int = 0, resamples: int = 1000
) -> float:
    """Return the standard error of `score`: see `Metric.standard_error`."""
    return find_metric(metric).standard_error(references, answers, seed=seed, resamples=resamples)


def rouge_2(reference: str, prediction: str) -> float:
    """Return ROUGE-2 as HELM computes it: the F1 of shared bigrams, 0 to 1, words stemmed (Lin 2004; rouge-score)."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge2"], use_stemmer=True)
    return float(scorer.score(reference, prediction)["rouge2"].fmeasure)


def mean(values: Sequence[float]) -> float:
    """Return the mean of the rows' scores, the same for any order of the rows."""
    return math.fsum(values) / len(values)


def mean_standard_error(values: Sequence[float], clusters: Sequence[Any] | None = None) -> float:
    """Return the standard error of `mean` over draws of the rows: s / sqrt(n). A single row gives 0.

    With `clusters`, the rows' sources, it is over draws of the C clusters: sqrt(C / (C - 1) sum_c (sum of the rows'
    deviations from the mean)^2) / n (Liang and Zeger 1986). A single cluster gives 0.
    """
    if clusters is None:
        sample = np.sort(np.asarray(values, dtype=np.float64))
        return 0.0 if len(sample) < 2 else float(sample.std(ddof=1) / np.sqrt(len(sample)))
    centre, sums = mean(values), dict[Any, list[float]]()
    for value, cluster in zip(values, clusters, strict=True):
        sums.setdefault(cluster, []).append(value - centre)
    count = len(sums)
    spread = math.fsum(math.fsum(own) ** 2 for own in sums.values())
    return 0.0 if count < 2 else math.sqrt(count / (count - 1) * spread) / len(values)


def _register(metric: Metric) -> None:
    """Add a metric. InputError if another module's has its name. Loading the same module twice is not an error."""
    if metric.answers not in get_args(Answers):
        raise InputError(
            f"metric {metric.name}: unknown answers {metric.answers!r}{nearest(metric.answers, get_args(Answers))}"
        )
    known = REGISTRY.get(_ALIASES.get(metric.name, metric.name))
    homes = [one.function.__module__ for one in (known, metric) if one is not None]
    if len({*homes}) > 1 or metric.name in _ALIASES:
        raise InputError(f"two metrics are named {metric.name}: in {' and '.join(homes)}; rename one")
    REGISTRY[metric.name] = metric


def _accuracy_error(references: Array, predictions: Array) -> float:
    accuracy = float(np.mean(references == predictions))
    return float(np.sqrt(accuracy * (1 - accuracy) / (len(references) - 1)))


def _f1_of_classes(references: Array, predictions: Array, average: str) -> float:
    """Return the mean F1 of the labels that occur. An answer that is no label has no F1 of its own."""
    labels = np.unique([references, predictions])
    return float(sk.f1_score(references, predictions, labels=labels[labels >= 0], average=average, zero_division=0.0))


def _of_class_1(function: Callable[..., float]) -> Function:
    return lambda references, predictions: function(references == 1, predictions == 1, zero_division=0.0)


def _mean_of_accuracy_and_f1(references: Array, predictions: Array) -> float:
    f1 = sk.f1_score(references == 1, predictions == 1, zero_division=0.0)
    return (float(sk.accuracy_score(references, predictions)) + float(f1)) / 2


def _matthews_correlation(references: Array, predictions: Array) -> float:
    if len(np.unique([references, predictions])) < 2:
        return 0.0  # scikit-learn returns 0 too, with a warning
    return float(sk.matthews_corrcoef(references, predictions))


def _kappa(references: Array, predictions: Array) -> float:
    if len(np.unique([references, predictions])) < 2:
        return 0.0  # scikit-learn returns NaN
    return float(sk.cohen_kappa_score(references, predictions))


def _correlation(*functions: Callable[[Array, Array], Any]) -> Function:
    """Return the mean of scipy's correlations."""

    def correlation(references: Array, predictions: Array) -> float:
        if len(references) < 2 or np.ptp(references) == 0 or np.ptp(predictions) == 0:
            return 0.0  # scipy returns NaN
        return float(sum(function(references, predictions).statistic for function in functions) / len(functions))

    return correlation


def _one_versus_rest(function: Callable[..., float]) -> Function:
    """Return the function of class 1's probability; of more labels, the mean over those that the references have."""

    def value(references: Array, probabilities: Array) -> float:
        labels = np.unique(references)
        if len(labels) < 2:
            return math.nan  # some versions of scikit-learn raise an error
        if probabilities.shape[1] == 2:
            return float(function(references == 1, probabilities[:, 1]))
        return float(function(references[:, None] == labels, probabilities[:, labels], average="macro"))

    return value


_BINARY: dict[str, Any] = {"labels": 2}
_ERROR: dict[str, Any] = {"answers": "number", "higher_is_better": False, "percent": False}
_BUILT_IN = (
    Metric("mcc", _matthews_correlation, resampled=resampling.matthews),
    Metric("acc", lambda r, a: sk.accuracy_score(r, a), closed_form=_accuracy_error, resampled=resampling.accuracy),
    Metric("acc_f1", _mean_of_accuracy_and_f1, resampled=resampling.accuracy_f1, **_BINARY),
    Metric("f1", _of_class_1(sk.f1_score), resampled=resampling.f1, **_BINARY),
    Metric("precision", _of_class_1(sk.precision_score), resampled=resampling.precision, **_BINARY),
    Metric("recall", _of_class_1(sk.recall_score), resampled=resampling.recall, **_BINARY),
    Metric("f1_macro", lambda r, a: _f1_of_classes(r, a, "macro"), resampled=resampling.f1_macro),
    Metric("f1_micro", lambda r, a: sk.f1_score(r, a, average="micro"), resampled=resampling.accuracy),
    Metric("f1_weighted", lambda r, a: _f1_of_classes(r, a, "weighted"), resampled=resampling.f1_weighted),
    Metric(
        "balanced_acc",
        lambda r, a: sk.recall_score(r, a, labels=np.unique(r), average="macro"),
        resampled=resampling.balanced_accuracy,
    ),
    Metric("cohen_kappa", _kappa, resampled=resampling.kappa),
    Metric("auroc", _one_versus_rest(sk.roc_auc_score), "probabilities", resampled=resampling.auroc),
    Metric(
        "average_precision",
        _one_versus_rest(sk.average_precision_score),
        "probabilities",
        resampled=resampling.average_precision,
    ),
    Metric("pearson", _correlation(stats.pearsonr), "number", resampled=resampling.pearson),
    Metric("spearman", _correlation(stats.spearmanr), "number", resampled=resampling.spearman),
    Metric(
        "pearson_spearman",
        _correlation(stats.pearsonr, stats.spearmanr),
        "number",
        resampled=resampling.pearson_spearman,
    ),
    Metric("kendall", _correlation(stats.kendalltau), "number"),
    Metric("mse", lambda r, a: sk.mean_squared_error(r, a), resampled=resampling.mean_squared_error, **_ERROR),
    Metric(
        "rmse", lambda r, a: sk.root_mean_squared_error(r, a), resampled=resampling.root_mean_squared_error, **_ERROR
    ),
    Metric("mae", lambda r, a: sk.mean_absolute_error(r, a), resampled=resampling.mean_absolute_error, **_ERROR),
    Metric("r2", lambda r, a: sk.r2_score(r, a), "number", resampled=resampling.r2),
)
for _one in _BUILT_IN:
    _register(_one)
