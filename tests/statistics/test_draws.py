"""Joint draws against rows that are drawn and scored one draw after the other."""

import time
from dataclasses import replace

import numpy as np
import pytest

from twin_bench.data.metric import Metric
from twin_bench.data.metrics import METRICS
from twin_bench.errors import InputError
from twin_bench.statistics.draws import Answers, score_draws

ROWS = 60


def identities(rows):
    return np.asarray([f"row {k * 7919 % 10007:05d}" for k in range(rows)])


def answered(metric, seed, rows=ROWS, classes=2, targets=None):
    """A method's answers to rows that are in no order of their identities."""
    rng = np.random.default_rng(seed)
    kind = None if metric is None else METRICS[metric].answers
    if kind == "number":
        targets = np.random.default_rng(0).integers(0, 26, rows) / 5
        predictions = np.round(targets + rng.normal(size=rows), 1)
    else:
        targets = np.random.default_rng(0).integers(0, classes, rows)
        predictions = np.where(rng.random(rows) < 0.3, rng.integers(-1, classes, rows), targets)
    if kind == "probabilities":
        predictions = np.eye(classes)[predictions] * 0.5 + rng.dirichlet(np.ones(classes), rows).round(2) / 2
    return Answers(identities(rows), rng.random(rows), targets, predictions)


def how_often(own, draws, **more):
    """How often each row is in each draw, (rows, draws): the score of a method that has one row alone right."""
    alone = {str(row): replace(own, scores=one) for row, one in enumerate(np.eye(len(own.identities)))}
    return np.stack([*score_draws(None, {**alone, **more}, draws=draws).values()])[: len(alone)]


@pytest.mark.parametrize("metric", ["mcc", "acc_f1", "f1_macro", "auroc", "pearson_spearman", "kendall", "rmse"])
def test_each_draws_score_is_the_metrics_of_its_rows(metric):
    methods = {f"method {seed}": answered(metric, seed) for seed in range(3)}
    found = score_draws(METRICS[metric], methods, draws=40)
    weights = ROWS * how_often(methods["method 0"], 40)
    np.testing.assert_allclose(weights, np.rint(weights), atol=1e-9)
    drawn = [np.repeat(np.arange(ROWS), own) for own in np.rint(weights).astype(int).T]
    for name, own in methods.items():
        expected = [METRICS[metric].function(own.targets[rows], own.predictions[rows]) for rows in drawn]
        np.testing.assert_allclose(found[name], expected, atol=1e-9)
    means = score_draws(None, methods, draws=40)
    for name, own in methods.items():
        np.testing.assert_allclose(means[name], [own.scores[rows].mean() for rows in drawn])


def test_rows_are_drawn_as_often_as_with_replacement():
    weights = ROWS * how_often(answered("acc", 0), 4000)
    np.testing.assert_allclose(weights.sum(axis=0), ROWS)
    # A multinomial: the mean is 1, the variance 1 - 1/n, and the covariance -1/n.
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=5 / np.sqrt(4000))
    covariance = np.cov(weights)
    assert np.diag(covariance).mean() == pytest.approx(1 - 1 / ROWS, rel=0.02)
    assert covariance[np.triu_indices(ROWS, 1)].mean() == pytest.approx(-1 / ROWS, rel=0.05)


def test_draws_of_other_rows_are_independent():
    own = answered("acc", 0)
    other = replace(own, identities=[f"another {identity}" for identity in own.identities])
    first, second = (score_draws(METRICS["acc"], {"own": one}, draws=4000)["own"] for one in (own, other))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


@pytest.mark.parametrize("metric", ["mcc", "pearson_spearman", "auroc", None])
def test_neither_the_rows_order_nor_other_methods_change_a_draw(metric):
    methods = {str(seed): answered(metric, seed) for seed in range(4)}
    chosen = METRICS.get(metric)
    whole = score_draws(chosen, methods, draws=900)
    backwards = score_draws(chosen, dict(reversed(methods.items())), draws=900)
    alone = score_draws(chosen, {"2": methods["2"]}, draws=900)
    order = np.random.default_rng(1).permutation(ROWS)
    shuffled = replace(
        methods["2"],
        **{part: getattr(methods["2"], part)[order] for part in ("identities", "scores", "targets", "predictions")},
    )
    again = score_draws(chosen, {**methods, "2": shuffled}, draws=900)
    few = score_draws(chosen, methods, draws=100)
    for found in (backwards, alone, again):
        np.testing.assert_allclose(found["2"], whole["2"], rtol=1e-12)
    np.testing.assert_allclose(few["2"], whole["2"][:100], rtol=1e-12)
    assert not np.allclose(score_draws(chosen, methods, seed=1, draws=900)["2"], whole["2"])


def test_a_method_that_lacks_a_row_is_scored_on_the_others_in_the_same_draws():
    whole = answered("mcc", 0)
    lacking = Answers(*(getattr(whole, part)[1:] for part in ("identities", "scores", "targets", "predictions")))
    found = score_draws(METRICS["mcc"], {"lacking": lacking, "whole": whole}, draws=50)
    weights = np.rint(ROWS * how_often(whole, 50)).astype(int)
    for column, value in enumerate(found["lacking"]):
        rows = np.repeat(np.arange(1, ROWS), weights[1:, column])
        assert value == pytest.approx(METRICS["mcc"].function(whole.targets[rows], whole.predictions[rows]), abs=1e-9)
    np.testing.assert_array_equal(found["whole"], score_draws(METRICS["mcc"], {"whole": whole}, draws=50)["whole"])
    one, two = Answers(["a"], [1]), Answers(["a", "b"], [1, 1])
    assert np.isnan(score_draws(None, {"one": one, "two": two}, draws=50)["one"]).any()


def test_rows_of_one_identity_are_told_apart_by_their_targets():
    """Two rows of one text with other labels: every method's answer to the first is matched with the others' to it."""
    first = Answers(["a", "b", "a", "c"], [1, 1, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0])
    second = Answers(["c", "a", "a", "b"], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1])
    for metric in (METRICS["acc"], None):
        found = score_draws(metric, {"first": first, "second": second}, draws=300)
        np.testing.assert_array_equal(found["first"], found["second"])
        assert len(np.unique(found["first"])) >= 4
    many = Answers(["a"] * 12, np.arange(12), np.arange(12), np.arange(12))
    back = Answers(["a"] * 12, np.arange(12)[::-1], np.arange(12)[::-1], np.arange(12)[::-1])
    found = score_draws(None, {"many": many, "back": back}, draws=300)
    np.testing.assert_allclose(found["many"], found["back"])


def test_whole_clusters_are_drawn():
    cluster = np.arange(ROWS) % 7
    own = replace(answered("acc", 0), clusters=[f"passage {one}" for one in cluster])
    shares = how_often(own, 4000)
    np.testing.assert_allclose(shares, shares[cluster])
    # A row's share of a draw is how often its cluster is drawn, of seven times, over how many rows are drawn.
    times = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=4000).T
    expected = times / (np.bincount(cluster) @ times)
    np.testing.assert_allclose(shares[:7].std(axis=1), expected.std(axis=1), rtol=0.07)
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    both = score_draws(None, {"of no known cluster": replace(own, clusters=None), "own": own}, draws=200)
    np.testing.assert_allclose(both["of no known cluster"], both["own"])


def test_a_row_without_a_cluster_is_its_own():
    first = Answers(["a", "b"], [1, 1], clusters=["p", "p"])
    second = Answers(["a", "b", "c", "d"], [0, 0, 1, 0])
    found = score_draws(None, {"first": first, "second": second}, draws=300)["second"]
    # Three clusters are drawn, of two rows and of one and one: c is in a draw up to three times, and so is d.
    assert {1.0, 0.0, 2 / 3, 1 / 3, 1 / 4} <= {*found}


def test_a_metric_of_ones_own_is_called_for_fewer_draws_which_are_repeated():
    calls = []

    def odd(references, answers):
        calls.append(len(references))
        return float(np.median(references == answers))

    own = answered("acc", 0)
    found = score_draws(Metric("odd", odd), {"own": own}, draws=2500)["own"]
    assert calls == [ROWS] * 1000
    np.testing.assert_array_equal(found[:1000], found[1000:2000])
    np.testing.assert_array_equal(found[:500], found[2000:])


def test_draws_in_which_a_metric_is_undefined_are_nan():
    own = Answers(list("abc"), [1, 1, 1], [0, 0, 1], [[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])
    found = score_draws(METRICS["auroc"], {"own": own}, draws=3000)["own"]
    assert np.isnan(found).mean() == pytest.approx(9 / 27, rel=0.1)
    assert {*np.unique(found[~np.isnan(found)])} == {0.0, 0.5, 1.0}
    assert score_draws(METRICS["acc"], {}) == {}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"scores": [1.0]}, "own has 3 identities and 1 scores; each row needs both"),
        ({"predictions": ["x", "y", "z"]}, "own: scores, targets and predictions must be numbers"),
        ({"targets": None}, "own has no targets or no predictions; acc is a metric of both"),
        ({"clusters": ["p", "p", "q"]}, "a row's cluster is 'q' for own and 'p' for another method"),
        ({"predictions": [0.5, 1, 1]}, "metric acc: answer 0.5 is no label's id"),
    ],
)
def test_bad_answers_are_one_line(changed, says):
    good = Answers(["a", "b", "c"], [1, 1, 0], [0, 1, 1], [0, 1, 0], ["p", "p", "p"])
    with pytest.raises(InputError, match=says):
        score_draws(METRICS["acc"], {"good": good, "own": replace(good, **changed)}, draws=10)
    with pytest.raises(InputError, match="own has 0 identities"):
        score_draws(None, {"own": Answers([], [])})


@pytest.mark.slow
def test_thirty_methods_on_eight_tasks_are_quick():
    """Ten seconds at most on two idle cores; the processor's time is of this process alone."""
    start = time.process_time()
    for metric in ("mcc", "acc", "acc_f1", "acc_f1", "acc", "acc", "acc", "pearson_spearman"):
        found = score_draws(METRICS[metric], {str(seed): answered(metric, seed, rows=1000) for seed in range(30)})
        assert len(found["29"]) == 10_000
    assert time.process_time() - start < 20
