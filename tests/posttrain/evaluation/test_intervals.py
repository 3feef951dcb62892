"""Quantiles of Student's t against the printed tables, and intervals by hand."""

import math
import random
from statistics import NormalDist, mean, stdev

import pytest

from gemma2.posttrain.evaluation.intervals import SERIES_UP_TO, central_probability, confidence_interval, student_t

# Two-sided 95 % and 99 % points (Fisher and Yates; Abramowitz and Stegun, table 26.10).
TABLE = {
    1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032), 7: (2.365, 3.499),
    10: (2.228, 3.169), 15: (2.131, 2.947), 30: (2.042, 2.750), 60: (2.000, 2.660), 120: (1.980, 2.617),
}  # fmt: skip


@pytest.mark.parametrize("df", TABLE)
def test_the_quantiles_are_those_of_the_tables(df):
    assert student_t(0.975, df) == pytest.approx(TABLE[df][0], abs=6e-4)
    assert student_t(0.995, df) == pytest.approx(TABLE[df][1], abs=6e-4)


def test_series_and_expansion_meet_and_end_in_the_normal_distribution():
    below, above = student_t(0.975, SERIES_UP_TO), student_t(0.975, SERIES_UP_TO + 1)
    assert 0 < below - above < 1e-4  # t falls by about 0.00006 here
    assert central_probability(above, SERIES_UP_TO + 1) == pytest.approx(0.95, abs=1e-11)
    assert student_t(0.975, 10**7) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-6)


def test_an_interval_by_hand():
    # t(4) = 2.776; 4.6 -+ 2.776 * 1.4353 = 0.6156, 8.5844
    assert confidence_interval(4.6, math.sqrt(2.06), 5) == pytest.approx((0.615, 8.585), abs=1e-3)


def test_an_interval_ends_where_the_quantity_does():
    assert confidence_interval(0.1, 0.2, 5, (0.0, 1.0)) == (0.0, pytest.approx(0.655, abs=1e-3))


@pytest.mark.parametrize(("value", "se", "units"), [(1.0, math.nan, 1), (1.0, 0.0, 1), (math.nan, 0.1, 9)])
def test_what_cannot_be_told_has_no_interval(value, se, units):
    assert confidence_interval(value, se, units) is None


def test_95_of_100_intervals_hold_the_mean():
    """Four normal values each: with the normal quantile instead of t, 85 of 100 would."""
    random.seed(3)
    hits, trials = 0, 3000
    for _ in range(trials):
        values = [random.gauss(1.0, 2.0) for _ in range(4)]
        low, high = confidence_interval(mean(values), stdev(values) / 2, 4)
        hits += low <= 1.0 <= high
    assert hits / trials == pytest.approx(0.95, abs=0.012)  # three standard errors of the share
