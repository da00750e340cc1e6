"""A simulation: methods with known truths, and how often the intervals hold these and the first group the best."""

import functools
from collections import defaultdict

import numpy as np
import pytest

from twin_bench.data.metrics import METRICS
from twin_bench.statistics.comparisons import difference, tie_groups
from twin_bench.statistics.draws import Answers, score_draws
from twin_bench.statistics.intervals import percentile, wilson

ROWS = 200
QUALITY = {"expert": 1.6, "best": 1.1, "equal": 1.1, "close": 1.0, "worse": 0.5, "bad": -0.1}
FLOOR = "constant"
MERGES = [*QUALITY][1:]


def noises(rng, rows):
    """Each method's noise: three fifths of its variance are the row's, because methods fail on the same rows."""
    shared = rng.normal(size=rows)
    return {name: 0.6**0.5 * shared + 0.4**0.5 * rng.normal(size=rows) for name in QUALITY}


def labels(positive, easier=0.0):
    """A task of two labels, of which 1 is that frequent; a label's rows may be easier than the other's."""

    def world(rng, rows):
        targets = (rng.random(rows) < positive).astype(int)
        right = {
            name: noise < QUALITY[name] + np.where(targets == 1, easier, -easier)
            for name, noise in noises(rng, rows).items()
        }
        answers = {name: np.where(hits, targets, 1 - targets) for name, hits in right.items()}
        return targets, {**answers, FLOOR: np.full(rows, int(positive > 0.5))}

    return world


def numbers(rng, rows):
    targets = np.round(5 * rng.beta(1.5, 1.2, size=rows), 1)
    answers = {name: targets + 2.2 * np.exp(-0.7 * QUALITY[name]) * noise for name, noise in noises(rng, rows).items()}
    return targets, {**answers, FLOOR: np.full(rows, 2.5)}


def texts(rng, rows):
    answers = {
        name: np.clip(0.25 + 0.12 * QUALITY[name] + 0.2 * noise, 0, 1) for name, noise in noises(rng, rows).items()
    }
    return None, {**answers, FLOOR: np.zeros(rows)}


TASKS = {
    "acc": ("acc", labels(0.55)),
    "mcc": ("mcc", labels(0.7, -0.3)),
    "acc_f1": ("acc_f1", labels(0.35, 0.2)),
    "pearson_spearman": ("pearson_spearman", numbers),
    "texts": (None, texts),
}


def scores(metric, targets, answers):
    if metric is None:
        return {name: float(own.mean()) for name, own in answers.items()}
    return {name: METRICS[metric].function(targets, own) for name, own in answers.items()}


@functools.cache
def truths():
    """The scores of so many rows that their error is a thirtieth of that of 200."""
    rng = np.random.default_rng(0)
    found = {task: scores(metric, *world(rng, 200_000)) for task, (metric, world) in TASKS.items()}
    return {task: {**own, "equal": own["best"]} for task, own in found.items()}


def replicate(seed, draws):
    """The scores of so many new rows, and of their draws."""
    rng = np.random.default_rng([1, seed])
    estimates, drawn = {}, {}
    for task, (metric, world) in TASKS.items():
        targets, answers = world(rng, ROWS)
        identities = [f"{task} {seed} {row}" for row in range(ROWS)]
        given = {
            name: Answers(identities, own) if targets is None else Answers(identities, own == targets, targets, own)
            for name, own in answers.items()
        }
        estimates[task] = scores(metric, targets, answers)
        drawn[task] = score_draws(None if metric is None else METRICS[metric], given, draws=draws)
    return estimates, drawn


def normalized(scored, name):
    return np.mean([100 * own[name] / own["expert"] for own in scored.values()], axis=0)


def gain(scored, name):
    return np.mean([100 * (own[name] - own[FLOOR]) / (own["expert"] - own[FLOOR]) for own in scored.values()], axis=0)


def coverage(replicates, draws):
    """How often each interval holds the truth, by kind and what it is of; and how often group 1 holds the best."""
    truth, held = truths(), defaultdict(list)
    for seed in range(replicates):
        estimates, drawn = replicate(seed, draws)
        for task in TASKS:
            for name in QUALITY:
                own = percentile(drawn[task][name], rows=ROWS)
                if task == "acc":
                    own = wilson(estimates[task][name] * ROWS, ROWS)
                held["score", task, name].append(own[0] <= truth[task][name] <= own[1])
        for name in MERGES:
            for kind in (normalized, gain):
                low, high = percentile(kind(drawn, name))
                held[kind.__name__, "mean", name].append(low <= kind(truth, name) <= high)
        for name in MERGES[1:]:
            found = difference(*(normalized(scored, one) for scored in (drawn, estimates) for one in ("best", name)))
            apart = normalized(truth, "best") - normalized(truth, name)
            held["difference", "mean", name].append(found.ci_low <= apart <= found.ci_high)
        values, all_draws = ([normalized(scored, name) for name in MERGES] for scored in (estimates, drawn))
        groups = tie_groups(values, np.stack(all_draws, axis=1))
        held["group", "mean", "best and equal"].append(groups[0] == groups[1] == 1)
    return {key: float(np.mean(own)) for key, own in held.items()}


def of_kind(found, kind):
    return [share for key, share in found.items() if key[0] == kind]


def assert_holds(found, least, most, slack):
    """All intervals of a kind together cover so often; each alone may by chance be off by `slack` more."""
    for kind in ("score", "normalized", "gain", "difference"):
        shares = of_kind(found, kind)
        assert least <= np.mean(shares) <= most, (kind, found)
        assert min(shares) >= least - slack, (kind, found)
    assert found["group", "mean", "best and equal"] >= 0.95, found


def test_intervals_cover_and_the_first_group_holds_the_best():
    assert_holds(coverage(40, draws=400), 0.91, 0.99, slack=0.12)


@pytest.mark.slow
def test_intervals_cover_92_to_98_of_100_truths():
    assert_holds(coverage(300, draws=1000), 0.92, 0.98, slack=0.02)
