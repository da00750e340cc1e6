import itertools
import time

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from twin_bench.data.metrics import METRICS, RESAMPLED, mean, mean_standard_error, score, standard_error


def peer(metric, references, predictions):
    """The same score from sklearn and scipy, in points."""
    if metric == "mcc":
        return 100 * matthews_corrcoef(references, predictions)
    if metric == "acc":
        return 100 * accuracy_score(references, predictions)
    if metric == "acc_f1":
        return 50 * (accuracy_score(references, predictions) + f1_score(references, predictions))
    pearson = scipy.stats.pearsonr(references, predictions).statistic
    return 50 * (pearson + scipy.stats.spearmanr(references, predictions).statistic)


def drawn(metric, rows, seed, noise=0.3, classes=2):
    """References and predictions that agree more or less; for the correlation with many ties, as in STS-B."""
    rng = np.random.default_rng(seed)
    if metric == "pearson_spearman":
        references = rng.integers(0, 26, rows) / 5
        return references, np.round(references + 10 * noise * rng.normal(size=rows), 1)
    references = rng.integers(0, classes, rows)
    return references, np.where(rng.random(rows) < noise, rng.integers(0, classes, rows), references)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [3, 20, 408, 1000])
@pytest.mark.parametrize("noise", [0.05, 0.4, 1.0])
def test_scores_equal_those_of_sklearn_and_scipy(metric, rows, noise):
    for seed in range(5):
        references, predictions = drawn(metric, rows, seed, noise)
        if len(set(references)) > 1 and len(set(predictions)) > 1:
            assert score(metric, references.tolist(), predictions.tolist()) == pytest.approx(
                peer(metric, references, predictions), abs=1e-9
            )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "classes"), [(2, 2), (7, 2), (40, 3), (300, 4)])
def test_all_draws_at_once_are_the_scores_of_each_draw(metric, rows, classes):
    references, predictions = drawn(metric, rows, rows, classes=classes)
    draws = np.random.default_rng(1).integers(0, rows, (50, rows))
    weights = np.stack([np.bincount(draw, minlength=rows) for draw in draws]).astype(float)
    at_once = RESAMPLED[metric](np.asarray([references, predictions], dtype=float), weights)
    each = [score(metric, references[draw], predictions[draw]) for draw in draws]
    np.testing.assert_allclose(100 * at_once, each, atol=1e-9)


def test_matthews_with_more_classes_than_the_task_has():
    references, predictions = drawn("mcc", 300, 0, 0.6)
    predictions = np.where(np.arange(300) % 7, predictions, -1)
    assert score("mcc", references, predictions) == pytest.approx(peer("mcc", references, predictions))
    references, predictions = drawn("mcc", 300, 0, 0.6, classes=3)
    assert score("mcc", references, predictions) == pytest.approx(peer("mcc", references, predictions))


def test_an_answer_that_is_no_label_is_wrong():
    assert score("acc", [0, 1, 1, 0], [-1, 1, 1, 0]) == 75
    # F1 of class 1: two found, none missed, none wrong.
    assert score("acc_f1", [0, 1, 1, 0], [-1, 1, 1, 0]) == (75 + 100) / 2


@pytest.mark.parametrize(
    ("metric", "references", "predictions", "expected"),
    [
        ("mcc", [0, 1, 0, 1], [1, 1, 1, 1], 0),
        ("mcc", [1, 1], [1, 1], 0),
        ("mcc", [0, 1, 1], [1, 0, 0], -100),
        ("acc_f1", [0, 0], [0, 0], 50),  # no row of class 1, and none predicted: its F1 is 0
        ("acc_f1", [1, 0], [1, 1], (50 + 200 / 3) / 2),
        ("pearson_spearman", [1, 2, 3], [0.1, 0.1, 0.1], 0),
        ("pearson_spearman", [4.1, 4.1], [1, 2], 0),
        ("pearson_spearman", [1, 2, 3], [-1, -2, -3], -100),
        ("pearson_spearman", [1e6, 1e6 + 1e-3, 1e6 + 2e-3], [1, 2, 3], 100),
    ],
)
def test_degenerate_and_extreme_cases(metric, references, predictions, expected):
    assert score(metric, references, predictions) == pytest.approx(expected, abs=1e-6)
    assert np.isfinite(standard_error(metric, references, predictions))


def written_out(metric, references, predictions):
    """The same score again, quick enough for thousands of draws; sklearn takes a millisecond each."""
    if metric == "mcc":
        return 100 * np.corrcoef(references, predictions)[0, 1]
    right, found = np.mean(references == predictions), np.sum(references * predictions)
    f1 = 2 * found / (np.sum(references) + np.sum(predictions))
    return {"acc": 100 * right, "acc_f1": 50 * (right + f1)}[metric]


@pytest.mark.parametrize("metric", METRICS)
def test_the_standard_error_equals_a_naive_bootstraps(metric):
    references, predictions = drawn(metric, 150, 1)
    rng = np.random.default_rng(2)
    draws = [rng.integers(0, 150, 150) for _ in range(3000)]
    alone = peer if metric == "pearson_spearman" else written_out
    assert alone(metric, references, predictions) == pytest.approx(peer(metric, references, predictions))
    naive = np.std([alone(metric, references[rows], predictions[rows]) for rows in draws], ddof=1)
    # Two estimates of one deviation from 3000 draws each differ by about 2%.
    assert standard_error(metric, references, predictions, resamples=3000) == pytest.approx(naive, rel=0.06)


def test_the_standard_error_of_accuracy_has_a_closed_form():
    references, predictions = [1] * 10, [1] * 8 + [0] * 2
    deviation = np.std([100] * 8 + [0] * 2, ddof=1)
    assert standard_error("acc", references, predictions) == pytest.approx(deviation / np.sqrt(10))


@pytest.mark.parametrize("metric", METRICS)
def test_the_standard_error_is_the_same_each_time_and_quick(metric):
    references, predictions = drawn(metric, 1000, 3)
    start = time.perf_counter()
    first = standard_error(metric, references, predictions)
    assert time.perf_counter() - start < 2
    assert first == standard_error(metric, references, predictions)
    assert standard_error(metric, references[:1], predictions[:1]) == 0
    if metric != "acc":
        assert first != standard_error(metric, references, predictions, seed=1)


def test_bad_calls_raise():
    with pytest.raises(ValueError, match="unknown metric 'f1'; known: mcc, acc, acc_f1"):
        score("f1", [1], [1])
    with pytest.raises(ValueError, match="0 references"):
        score("acc", [], [])
    with pytest.raises(ValueError, match="2 references and 1 predictions"):
        score("acc", [1, 1], [1])
    with pytest.raises(ValueError, match="finite"):
        score("pearson_spearman", [1, 2], [1, float("nan")])


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_of_one_row_alone_has_correlation_0(seed):
    references, predictions = np.random.default_rng(seed).normal(size=(2, 3))
    draws = [list(rows) for rows in itertools.product(range(3), repeat=3)]  # all, equally likely
    scores = [
        peer("pearson_spearman", references[rows], predictions[rows]) if len(set(rows)) > 1 else 0.0 for rows in draws
    ]
    with np.errstate(all="raise"):  # a draw's variance that is rounding alone may be negative
        found = standard_error("pearson_spearman", references, predictions, resamples=20_000)
    assert found == pytest.approx(np.std(scores), rel=0.02)


def test_errors_and_means_do_not_depend_on_the_rows_order() -> None:
    rng = np.random.default_rng(4)
    references, predictions = rng.normal(size=(2, 60)).round(1)
    values = rng.random(60)
    for _ in range(5):
        order = rng.permutation(60)
        for metric in ("pearson_spearman", "mcc", "acc_f1"):
            pair = (references, predictions) if metric == "pearson_spearman" else (references > 0, predictions > 0)
            first = standard_error(metric, *pair, seed=3)
            assert first > 0
            assert standard_error(metric, pair[0][order], pair[1][order], seed=3) == first
        assert mean(values[order]) == mean(values)
        assert mean_standard_error(values[order]) == mean_standard_error(values)
