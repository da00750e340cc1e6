"""Differences, adjusted p-values and ranks against plain loops and figures worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from twin_bench.statistics.comparisons import Difference, difference, holm, rank_ranges, tie_groups
from twin_bench.statistics.intervals import effective_rows


def test_a_difference_is_of_the_same_draws():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=10_000)
    first, second = 80 + rows, 79.9 + rows + 0.1 * rng.normal(size=10_000)
    found = difference(first, second, 80, 79.9)
    assert found.difference == pytest.approx(0.1)
    assert (found.ci_low, found.ci_high) == pytest.approx((0.1 - 0.196, 0.1 + 0.196), abs=0.01)
    assert found.p == pytest.approx(2 * stats.norm.cdf(-1), abs=0.02)
    turned = difference(second, first, 79.9, 80)
    assert (turned.difference, turned.p) == (-found.difference, found.p)
    assert (turned.ci_low, turned.ci_high) == pytest.approx((-found.ci_high, -found.ci_low))


def test_ps_are_of_the_draws_and_never_0():
    draws = np.arange(-3.0, 96)  # 99 draws, of which 4 are 0 or less
    assert difference(draws, np.zeros(99), 40, 0).p == pytest.approx(2 * 5 / 100)
    assert difference(draws + 50, np.zeros(99), 90, 0).p == pytest.approx(2 / 100)
    assert difference(np.zeros(99), draws + 50, 0, 90).p == pytest.approx(2 / 100)
    for undefined in (np.nan, np.inf):
        holed = np.where(draws > 90, undefined, draws)
        assert difference(holed, np.zeros(99), 40, 0).p == pytest.approx(2 * 5 / 95)


def test_equal_methods_and_methods_without_a_value():
    draws = 90 + np.random.default_rng(0).normal(size=1000)
    assert difference(draws, draws * (1 + 1e-15), 90, 90 * (1 + 1e-15)) == Difference(0, 0, 0, 1)
    for found in (
        difference(draws, np.full(1000, np.nan), 90, 90),
        difference(draws, draws, math.nan, 90),
    ):
        assert all(map(math.isnan, (found.difference, found.ci_low, found.ci_high, found.p)))


def test_holms_adjusted_ps():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03; the last is not below the one before.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.01, math.nan, 0.04]), [0.02, math.nan, 0.04])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert len(holm([])) == 0


def above(values, draws):
    """Which methods are above which for sure, in plain loops."""
    methods = range(len(values))
    error = {(i, j): np.std(draws[:, i] - draws[:, j], ddof=1) for i in methods for j in methods if i != j}
    largest = [max(abs(draw[i] - draw[j] - (values[i] - values[j])) / error[i, j] for i, j in error) for draw in draws]
    critical = np.sort(largest)[math.ceil(0.95 * len(draws)) - 1]
    return {(i, j) for i, j in error if values[i] - values[j] > critical * error[i, j]}


@pytest.mark.parametrize("seed", range(4))
def test_ranks_and_ties_by_all_comparisons_at_once(seed):
    rng = np.random.default_rng(seed)
    values = rng.permutation([90.0, 89, 85, 84.5, 80, 60]) + rng.normal(size=6)
    draws = values + rng.normal(size=(401, 1)) * 5 + rng.normal(size=(401, 6)) * [0.3, 1, 0.5, 2, 1, 1]
    sure = above(values, draws)
    expected = [
        (1 + sum((j, i) in sure for j in range(6)), 6 - sum((i, j) in sure for j in range(6))) for i in range(6)
    ]
    assert rank_ranges(values, draws) == expected
    groups, number = [0] * 6, 0
    for best in np.argsort(-values):
        if not groups[best]:
            number += 1
            for other in range(6):
                if not groups[other] and (best, other) not in sure:
                    groups[other] = number
    assert tie_groups(values, draws) == groups
    assert len({*groups}) > 1
    order = rng.permutation(6)
    assert rank_ranges(values[order], draws[:, order]) == [expected[method] for method in order]


def test_ranks_of_equal_methods_of_one_and_of_none():
    draws = np.random.default_rng(0).normal(size=(500, 1))
    same = np.hstack([90 + draws, 90 + draws, 60 + draws, 60 + draws])
    same[:, 1] *= 1 + 1e-15
    assert rank_ranges([90, 90, 60, 60], same) == [(1, 2), (1, 2), (3, 4), (3, 4)]
    assert tie_groups([90, 90, 60, 60], same) == [1, 1, 2, 2]
    assert (rank_ranges([3], draws), tie_groups([3], draws)) == ([(1, 1)], [1])
    assert (rank_ranges([], draws[:, :0]), tie_groups([], draws[:, :0])) == ([], [])


def test_a_method_without_a_value_is_left_out():
    rng = np.random.default_rng(0)
    values = np.array([90, math.nan, 70, 50])
    draws = values + rng.normal(size=(500, 4))
    draws[:3, 0] = math.nan
    assert rank_ranges(values, draws) == [(1, 1), None, (2, 2), (3, 3)]
    assert tie_groups(values, draws) == [1, None, 2, 3]
    draws[4, 2] = math.inf  # a score of 0 in a draw, of which less is better
    assert rank_ranges(values, draws) == [(1, 1), None, (2, 2), (3, 3)]
    draws[:, 2] += 19.9
    assert tie_groups([90, math.nan, 89.9, 50], draws) == [1, None, 1, 2]
    draws[:, 2] -= 19.9
    draws[:, 3] = math.nan
    assert tie_groups(values, draws) == [1, None, 2, None]


def test_ranks_hold_for_all_methods_at_once():
    """Of eight methods of three qualities, all ranges hold the true ranks with 95%, and group 1 the best."""
    rng = np.random.default_rng(0)
    truth = np.repeat([1.0, 0.95, 0.5], [3, 3, 2])
    lows, highs = [1] * 3 + [4] * 3 + [7] * 2, [3] * 3 + [6] * 3 + [8] * 2
    held = first = 0
    for _ in range(200):
        values = truth + 0.02 * rng.normal(size=8)
        draws = values + 0.02 * rng.normal(size=(400, 8))
        ranges = rank_ranges(values, draws)
        held += all(best <= high and worst >= low for (best, worst), low, high in zip(ranges, lows, highs, strict=True))
        first += all(group == 1 for group in tie_groups(values, draws)[:3])
    assert held >= 0.93 * 200
    assert first >= 0.93 * 200


def test_a_few_draws_of_a_small_denominator_do_not_tie_all_methods():
    """Their ratios are far out. Standard deviations of the draws would be theirs alone."""
    rng = np.random.default_rng(0)
    values = np.array([90.0, 60.0])
    draws = values + rng.normal(size=(5_000, 2))
    draws[:20, 0] *= 1_000
    assert rank_ranges(values, draws) == [(1, 1), (2, 2)]
    assert tie_groups(values, draws) == [1, 2]


def test_one_task_of_few_clusters_does_not_hide_what_others_show():
    few, many = effective_rows([1.0, 100.0], [5, 1_000]), effective_rows([1.0, 1.0], [5, 1_000])
    assert few == pytest.approx(1 + 101**2 / (1 / 4 + 100**2 / 999))
    assert few > 900
    assert many == pytest.approx(1 + 4 / (1 / 4 + 1 / 999))
    assert effective_rows([0.0, 1.0], [2, 50]) == pytest.approx(50)
    rng = np.random.default_rng(0)
    found = difference(40 + rng.normal(size=10_000), rng.normal(size=10_000), 40.0, 0.0, rows=5)
    assert found.p < 0.001  # no draw crosses zero, and so few draws can't count how sure that is
