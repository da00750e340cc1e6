"""The metrics against scikit-learn and scipy called directly, and their standard errors against naive bootstraps."""

import itertools
import re
import time

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from twin_bench.data.metrics import METRICS, find_metric, mean, mean_standard_error, score, standard_error
from twin_bench.errors import InputError

AT_ONCE = [name for name, metric in METRICS.items() if metric.resampled]


def class_1(function):
    return lambda r, a: 100 * function(r, a, labels=[1], average=None, zero_division=0.0)[0]


def f1_of_classes(average):
    def peer(references, answers):
        classes = sorted({*references, *answers} - {-1})
        f1 = [sk.f1_score(references, answers, labels=[c], average=None, zero_division=0.0)[0] for c in classes]
        return 100 * np.average(f1, weights=None if average == "macro" else [np.sum(references == c) for c in classes])

    return peer


def correlation(*functions):
    return lambda r, a: np.mean([100 * function(r, a).statistic for function in functions])


PEERS = {
    "mcc": lambda r, a: 100 * sk.matthews_corrcoef(r, a),
    "acc": lambda r, a: 100 * sk.accuracy_score(r, a),
    "acc_f1": lambda r, a: (100 * sk.accuracy_score(r, a) + class_1(sk.f1_score)(r, a)) / 2,
    "f1": class_1(sk.f1_score),
    "precision": class_1(sk.precision_score),
    "recall": class_1(sk.recall_score),
    "f1_macro": f1_of_classes("macro"),
    "f1_micro": lambda r, a: 100 * sk.f1_score(r, a, average="micro"),
    "f1_weighted": f1_of_classes("weighted"),
    "balanced_acc": lambda r, a: 100 * sk.balanced_accuracy_score(r, a),
    "cohen_kappa": lambda r, a: 100 * sk.cohen_kappa_score(r, a),
    "pearson": correlation(scipy.stats.pearsonr),
    "spearman": correlation(scipy.stats.spearmanr),
    "pearson_spearman": correlation(scipy.stats.pearsonr, scipy.stats.spearmanr),
    "kendall": correlation(scipy.stats.kendalltau),
    "mse": sk.mean_squared_error,
    "rmse": lambda r, a: np.sqrt(np.mean((r - a) ** 2)),
    "mae": sk.mean_absolute_error,
    "r2": lambda r, a: 100 * sk.r2_score(r, a),
    "auroc": lambda r, a: 100 * sk.roc_auc_score(r, a[:, 1] if a.shape[1] == 2 else a, multi_class="ovr"),
    "average_precision": lambda r, a: (
        100 * np.mean([sk.average_precision_score(r == c, a[:, c]) for c in range(a.shape[1])][a.shape[1] == 2 :])
    ),
}
"""The same scores from scikit-learn and scipy, in points."""


def drawn(metric, rows, seed, noise=0.3, classes=2):
    """References and answers that agree more or less; some labels are -1, and numbers have many ties, as in STS-B."""
    rng = np.random.default_rng(seed)
    if METRICS[metric].answers == "number":
        references = rng.integers(0, 26, rows) / 5
        return references, np.round(references + 10 * noise * rng.normal(size=rows), 1)
    references = rng.integers(0, classes, rows)
    if METRICS[metric].answers == "probabilities":
        scores = np.eye(classes)[references] + 3 * noise * rng.random((rows, classes)).round(1)
        return references, scores / scores.sum(axis=1, keepdims=True)
    return references, np.where(rng.random(rows) < noise, rng.integers(-1, classes, rows), references)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "classes", "noise"), [(4, 2, 0.4), (20, 2, 1.0), (408, 2, 0.05), (1000, 3, 0.4)])
def test_scores_equal_those_of_sklearn_and_scipy(metric, rows, classes, noise):
    compared = 0
    for seed in range(5):
        references, answers = drawn(metric, rows, seed, noise, METRICS[metric].labels or classes)
        if len({*references}) > 1 and len(np.unique(answers)) > 1:
            found = score(metric, references.tolist(), answers.tolist())
            assert found == pytest.approx(PEERS[metric](references, answers), abs=1e-9)
            compared += 1
    assert compared >= 3


rows_of_labels = st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 1)), min_size=1, max_size=9)


@given(rows_of_labels)
@settings(max_examples=15, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_metrics_of_labels_on_any_rows(rows):
    references, answers = np.array(rows).T
    for name, metric in METRICS.items():
        expected = PEERS[name](references, answers) if metric.answers == "label" else 0.0
        if metric.answers == "label":
            assert metric.score(references, answers) == pytest.approx(0.0 if np.isnan(expected) else expected)


def value(metric, references, answers):
    """The score, NaN where the metric is undefined."""
    try:
        return score(metric, references, answers)
    except InputError:
        return np.nan


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rows", "classes"), [(2, 2), (7, 2), (40, 3), (300, 4)])
def test_all_draws_at_once_are_the_scores_of_each_draw(metric, rows, classes):
    references, predictions = drawn(metric, rows, rows, classes=METRICS[metric].labels or classes)
    draws = np.random.default_rng(1).integers(0, rows, (50, rows))
    weights = np.stack([np.bincount(draw, minlength=rows) for draw in draws], axis=1).astype(float)
    _, others = drawn(metric, rows, rows + 1, classes=METRICS[metric].labels or classes)
    at_once = METRICS[metric].over_draws(references, [predictions, others])(weights)
    points = 100 if METRICS[metric].percent else 1
    for answers, found in zip([predictions, others], at_once, strict=True):
        each = [value(metric, references[draw], answers[draw]) for draw in draws]
        np.testing.assert_allclose(points * found, each, atol=1e-9)


def test_an_answer_that_is_no_label_is_wrong():
    assert score("acc", [0, 1, 1, 0], [-1, 1, 1, 0]) == 75
    # F1 of class 1: two found, none missed, none wrong.
    assert score("acc_f1", [0, 1, 1, 0], [-1, 1, 1, 0]) == (75 + 100) / 2
    # F1 of class 0 is 2/3, that of class 1 is 1, and -1 is no class to have one.
    assert score("f1_macro", [0, 1, 1, 0], [-1, 1, 1, 0]) == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert score("balanced_acc", [0, 1, 1, 0], [-1, 1, 1, 0]) == 75


@pytest.mark.parametrize(
    ("metric", "references", "predictions", "expected"),
    [
        ("mcc", [0, 1, 0, 1], [1, 1, 1, 1], 0),
        ("mcc", [1, 1], [1, 1], 0),
        ("mcc", [0, 1, 1], [1, 0, 0], -100),
        ("acc_f1", [0, 0], [0, 0], 50),  # no row of class 1, and none predicted: its F1 is 0
        ("acc_f1", [1, 0], [1, 1], (50 + 200 / 3) / 2),
        ("cohen_kappa", [1, 1], [1, 1], 0),
        ("kendall", [1, 2, 3], [0.1, 0.1, 0.1], 0),
        ("pearson_spearman", [1, 2, 3], [0.1, 0.1, 0.1], 0),
        ("pearson_spearman", [4.1, 4.1], [1, 2], 0),
        ("pearson_spearman", [1, 2, 3], [-1, -2, -3], -100),
        ("pearson_spearman", [1e6, 1e6 + 1e-3, 1e6 + 2e-3], [1, 2, 3], 100),
    ],
)
def test_degenerate_and_extreme_cases(metric, references, predictions, expected):
    assert score(metric, references, predictions) == pytest.approx(expected, abs=1e-6)
    assert np.isfinite(standard_error(metric, references, predictions))


def written_out(metric, references, answers):
    """The same score again, quick enough for thousands of draws; sklearn takes a millisecond each."""
    if metric == "rmse":
        return np.sqrt(np.mean((references - answers) ** 2))
    if metric == "pearson_spearman":
        return PEERS[metric](references, answers)
    right, found = np.mean(references == answers), np.sum((references == 1) & (answers == 1))
    f1 = 2 * found / (np.sum(references == 1) + np.sum(answers == 1))
    return {"acc": 100 * right, "acc_f1": 50 * (right + f1), "f1": 100 * f1}[metric]


@pytest.mark.parametrize("metric", ["acc", "acc_f1", "f1", "pearson_spearman", "rmse"])
def test_the_standard_error_equals_a_naive_bootstraps(metric):
    references, answers = drawn(metric, 150, 1)
    rng = np.random.default_rng(2)
    draws = [rng.integers(0, 150, 150) for _ in range(2000)]
    assert written_out(metric, references, answers) == pytest.approx(PEERS[metric](references, answers))
    naive = np.std([written_out(metric, references[rows], answers[rows]) for rows in draws], ddof=1)
    # Two estimates of one deviation from 2000 draws each differ by about 2%.
    assert standard_error(metric, references, answers, resamples=2000) == pytest.approx(naive, rel=0.07)


def test_the_standard_error_of_accuracy_has_a_closed_form():
    references, predictions = [1] * 10, [1] * 8 + [0] * 2
    deviation = np.std([100] * 8 + [0] * 2, ddof=1)
    assert standard_error("acc", references, predictions) == pytest.approx(deviation / np.sqrt(10))


@pytest.mark.parametrize("metric", METRICS)
def test_the_standard_error_is_the_same_for_rows_in_any_order(metric):
    references, answers = drawn(metric, 60, 3, noise=0.6)
    quick = {"resamples": 1000 if METRICS[metric].resampled else 9}
    first = standard_error(metric, references, answers, **quick)
    assert first > 0
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(60)
        assert standard_error(metric, references[order], answers[order], **quick) == first
    assert standard_error(metric, references[:1], answers[:1]) == 0
    if metric != "acc":
        assert first != standard_error(metric, references, answers, seed=1, **quick)


@pytest.mark.parametrize("metric", AT_ONCE)
def test_draws_at_once_are_quick(metric):
    references, answers = drawn(metric, 1000, 3)
    start = time.process_time()
    standard_error(metric, references, answers)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("metric", "references", "answers", "says"),
    [
        (
            "f1_marco",
            [1],
            [1],
            "unknown metric 'f1_marco'; did you mean 'f1_macro'. known: acc, acc_f1, accuracy, auroc",
        ),
        (3, [1], [1], "a metric has a name, not 3"),
        ("acc", [], [], "metric acc of 0 references and 0 answers"),
        ("acc", [1, 1], [1], "metric acc of 2 references and 1 answers"),
        ("acc", [1, 1], ["a", "b"], "metric acc: references and answers must be numbers"),
        ("acc", [1, 1], [0.5, 1], "metric acc: answer 0.5 is no label's id"),
        ("acc", [1, 1], [[0, 1], [1, 0]], r"metric acc: .* answers \(n,\); they are \(2,\) and \(2, 2\)"),
        ("pearson", [1, 2], [1, float("nan")], "metric pearson: references and answers must be finite"),
        ("f1", [0, 1, 2], [0, 1, 1], "f1 is a metric of 2 labels, and there are 3; take .* f1_macro"),
        ("auroc", [0, 1], [0.5, 0.5], r"metric auroc: .* answers \(n, labels\)"),
        ("auroc", [0, 2], [[0.5, 0.5]] * 2, "metric auroc: references must be labels from 0 to 1"),
        ("auroc", [0, 1], [[-0.7, -0.7]] * 2, "metric auroc: probabilities must be from 0 to 1; found -0.7 and -0.7"),
        ("auroc", [1, 1], [[0.5, 0.5]] * 2, "metric auroc is nan for these 2 rows, of 1 different references"),
        ("math.tau", [1], [1], "metric math.tau is 6.28.*; name a function"),
        ("math.huppot", [1], [1], "metric math.huppot: math has no 'huppot'; did you mean 'hypot'?"),
        ("mathh.hypot", [1], [1], "metric mathh.hypot: mathh can't be imported: ModuleNotFoundError"),
        ("math.hypot", [1, 1], [1, 1], "metric math.hypot can't be computed: TypeError: only "),
        ("numpy.equal", [1], [1], "metric numpy.equal returned array.* it must return a number"),
        ("numpy.array_equal", [1], [1], "metric numpy.array_equal returned True; it must return a number"),
    ],
)
def test_bad_calls_are_one_line(metric, references, answers, says):
    for call in (score, standard_error):
        with pytest.raises(InputError, match=says):
            call(metric, references, answers)
        if len(references) == 1:
            break  # the standard error of one row needs no function


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_of_one_row_alone_has_correlation_0(seed):
    references, predictions = np.random.default_rng(seed).normal(size=(2, 3))
    draws = [list(rows) for rows in itertools.product(range(3), repeat=3)]  # all, equally likely
    scores = [
        PEERS["pearson_spearman"](references[rows], predictions[rows]) if len(set(rows)) > 1 else 0.0 for rows in draws
    ]
    with np.errstate(all="raise"):  # a draw's variance that is rounding alone may be negative
        found = standard_error("pearson_spearman", references, predictions, resamples=20_000)
    assert found == pytest.approx(np.std(scores), rel=0.02)


def test_means_do_not_depend_on_the_rows_order():
    values = np.random.default_rng(4).random(60)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(60)
        assert mean(values[order]) == mean(values)
        assert mean_standard_error(values[order]) == mean_standard_error(values)


def test_draws_in_which_a_metric_is_undefined_are_left_out_and_counted(caplog):
    references, probabilities = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])
    # Over draws of both labels, auroc is 1 if no drawn row of label 0 is the second, 0 if all are, and else 1/2.
    draws = [rows for rows in itertools.product(range(3), repeat=3) if len({*references[list(rows)]}) == 2]
    values = [100 * sk.roc_auc_score(references[list(rows)], probabilities[list(rows), 1]) for rows in draws]
    found = standard_error("auroc", references, probabilities, resamples=600)
    assert found == pytest.approx(np.std(values), rel=0.1)
    (line,) = caplog.messages
    left_out = int(re.fullmatch(r"auroc is undefined in (\d+) of 600 draws .*", line)[1])
    assert left_out == pytest.approx(600 * 9 / 27, rel=0.2)
    with pytest.raises(InputError, match="auroc has no standard error: it is undefined in 1 of 2 draws"):
        standard_error("auroc", references, probabilities, resamples=2, seed=0)


def test_a_metric_by_its_dotted_name():
    references, answers = drawn("acc", 40, 0)
    found = find_metric("sklearn.metrics.jaccard_score")
    assert (found.name, found.answers, found.percent) == ("sklearn.metrics.jaccard_score", "label", True)
    binary = np.abs(answers)
    assert found.score(references, binary) == pytest.approx(100 * sk.jaccard_score(references, binary))
    assert found.identity[0] == found.name
    assert len(found.identity) == 2
    assert find_metric("balanced_accuracy") is METRICS["balanced_acc"]
    assert METRICS["balanced_acc"].identity == ["balanced_acc"]


def test_which_tasks_a_metric_fits():
    assert [labels for labels in range(1, 4) if METRICS["acc_f1"].fits(labels)] == [2]
    assert [labels for labels in range(1, 4) if METRICS["auroc"].fits(labels)] == [2, 3]
    assert [labels for labels in range(1, 4) if METRICS["mse"].fits(labels)] == [1]
    METRICS["f1"].require(2, "task rte")
    with pytest.raises(InputError, match=r"^task mnli: f1 is a metric of 2 labels, and there are 3; take .* f1_macro"):
        METRICS["f1"].require(3, "task mnli")
    with pytest.raises(InputError, match=r"^task stsb: acc is a metric of labels, .* such as pearson"):
        METRICS["acc"].require(1, "task stsb")
    with pytest.raises(InputError, match=r"^task rte: mse is a metric of numbers, .* 2 labels; .* such as acc"):
        METRICS["mse"].require(2, "task rte")


def test_rows_of_one_source_are_drawn_together() -> None:
    """Rows that are copies of each other say no more than one of them, and without clusters they seem to."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    answers = np.where(rng.random(300) < 0.8, labels, 1 - labels)
    copies, sources = 4, np.repeat(np.arange(300), 4)
    many, answered = np.repeat(labels, copies), np.repeat(answers, copies)
    shuffled = rng.permutation(len(many))
    for name in ("acc", "mcc", "f1_macro"):
        metric = find_metric(name)
        alone = metric.standard_error(labels, answers)
        found = metric.standard_error(many, answered, clusters=sources)
        assert found == pytest.approx(alone, rel=0.1)
        assert metric.standard_error(many, answered) == pytest.approx(alone / 2, rel=0.1)
        again = metric.standard_error(many[shuffled], answered[shuffled], clusters=sources[shuffled])
        assert again == found
    hits = (many == answered).astype(float)
    assert mean_standard_error(hits, sources) == pytest.approx(mean_standard_error(hits[::copies]), rel=1e-9)
    assert mean_standard_error([1.0, 0.0], ["a", "a"]) == 0.0
