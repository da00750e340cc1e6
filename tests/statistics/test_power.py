"""The detectable difference against McNemar's test on drawn rows."""

import math

import numpy as np
import pytest
from scipy import stats

from twin_bench.statistics.power import detectable_difference, detectable_mean_difference


def power(rows, discordant, found, level=0.95):
    """How often McNemar's test (with the normal's quantile) sees a difference, over drawn discordant rows."""
    rng = np.random.default_rng(0)
    gained, lost, _ = rng.multinomial(
        rows, [(discordant + found) / 2, (discordant - found) / 2, 1 - discordant], size=40_000
    ).T
    with np.errstate(invalid="ignore"):
        return np.mean(np.abs(gained - lost) / np.sqrt(gained + lost) > stats.norm.ppf((1 + level) / 2))


@pytest.mark.parametrize(("rows", "discordant"), [(200, 0.3), (1000, 0.1), (1000, 0.25), (5000, 0.05)])
def test_mcnemars_test_sees_it_with_the_power_that_is_asked_for(rows, discordant):
    found = detectable_difference(rows, discordant)
    assert power(rows, discordant, found) == pytest.approx(0.8, abs=0.03)
    surer = detectable_difference(rows, discordant, level=0.99, power=0.9)
    assert power(rows, discordant, surer, 0.99) == pytest.approx(0.9, abs=0.03)


def test_few_rows():
    assert detectable_difference(3) == 1
    few = detectable_difference(30, 0.1)  # three discordant rows show nothing, so more must be for one method
    assert few > 0.1
    assert power(30, few, few) > 0.75


def test_a_normalized_means_difference():
    """Of tasks of accuracies: the mean of independent differences, each of the variance discordant / rows."""
    rows, rng = [200, 400, 1000], np.random.default_rng(0)
    found = detectable_mean_difference(rows, 0.2, expert=0.8)
    differences = [
        np.subtract(*rng.multinomial(count, [0.1, 0.1, 0.8], size=100_000).T[:2]) / count / 0.8 for count in rows
    ]
    error = 100 * np.mean(differences, axis=0).std()
    assert found == pytest.approx((1.959964 + 0.841621) * error, rel=0.01)
    assert detectable_mean_difference([1000] * 4) == pytest.approx(detectable_mean_difference([1000]) / 2)
    assert detectable_mean_difference([1000]) == pytest.approx(100 * detectable_difference(1000), rel=0.01)
    assert math.isclose(detectable_mean_difference([500]), detectable_mean_difference([1000]) * math.sqrt(2))
