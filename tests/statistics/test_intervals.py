"""Intervals against scipy's."""

import math

import numpy as np
import pytest
from scipy import stats

from twin_bench.statistics.intervals import percentile, wilson


@pytest.mark.parametrize(("successes", "rows"), [(0, 5), (5, 5), (1, 30), (181, 200), (437, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilsons_interval_is_scipys(successes, rows, level):
    expected = stats.binomtest(successes, rows).proportion_ci(level, method="wilson")
    assert wilson(successes, rows, level) == pytest.approx((expected.low, expected.high), abs=1e-12)
    low, high = wilson(successes, rows, level)
    assert 0 <= low <= successes / rows <= high <= 1
    assert all(map(math.isnan, wilson(0, 0)))


def test_the_expanded_interval_is_students_for_a_few_rows():
    sample = np.random.default_rng(0).normal(size=12)
    draws = sample.mean() + sample.std() / np.sqrt(12) * stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    expected = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
    assert percentile(draws, rows=12) == pytest.approx((expected.low, expected.high), abs=1e-3)
    assert percentile(draws, rows=10**6) == pytest.approx(percentile(draws), abs=1e-5)
    assert np.isnan(percentile(draws, rows=1)).all()


def test_the_percentile_interval_leaves_out_undefined_draws():
    draws = np.random.default_rng(0).permutation(np.append(np.arange(1001.0), [np.nan] * 99 + [np.inf]))
    assert percentile(draws) == pytest.approx((25, 975))
    assert percentile(draws, 0.9) == pytest.approx((50, 950))
    assert percentile(np.array([2.0])) == (2, 2)
    assert all(map(math.isnan, percentile(np.array([np.nan, np.nan]))))
