"""Paired comparison: known values, planted gains, equal models, clusters."""

import math
import statistics

import numpy as np
import pytest

from gemma2.posttrain.evaluation.compared.paired import Pairs, compare, mcnemar, score_interval


def flips(n, gained, lost, right=0):
    """Rows of which `gained` are right only here, `lost` only there, `right` in both."""
    ours = [1.0] * gained + [0.0] * lost + [1.0] * right + [0.0] * (n - gained - lost - right)
    theirs = [0.0] * gained + [1.0] * lost + [1.0] * right + [0.0] * (n - gained - lost - right)
    return Pairs.of([str(i) for i in range(n)], ours, theirs)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (1, 7, 0.0703125),  # airway measurements, Fagerland, Lydersen, Laake 2013 (doi:10.1186/1471-2288-13-91)
        (7, 1, 0.0703125),
        (6, 16, 0.052478790283203125),  # binomial(22, 1/2): 2 P(X <= 6)
        (0, 5, 2 / 2**5),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_the_exact_p_of_mcnemar(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-12)


def test_many_flips_keep_their_digits():
    """10,000 flips, split by three standard deviations: the normal tail with continuity correction."""
    z = (150 - 0.5) / math.sqrt(2500)
    assert mcnemar(5150, 4850) == pytest.approx(2 * (1 - statistics.NormalDist().cdf(z)), rel=0.01)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "ends"),
    [
        (1, 7, 21, (-0.517, -0.026)),  # Fagerland et al. 2013, Tango's asymptotic score interval
        (7, 1, 21, (0.026, 0.517)),
    ],
)
def test_the_score_interval_of_a_difference(gained, lost, n, ends):
    assert score_interval(gained, lost, n) == pytest.approx(ends, abs=5e-4)


def test_rows_that_all_agree_still_have_an_interval():
    """No row flipped of 50: z^2 / (n + z^2) either way, not zero width."""
    z2 = statistics.NormalDist().inv_cdf(0.975) ** 2
    assert score_interval(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)), abs=1e-9)


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0, 0.0] * 10, [0.3, -1.7, 2.2, 5.1] * 10])
@pytest.mark.parametrize("groups", [(), ["a", "b"] * 20])
def test_equal_models_differ_by_exactly_nothing(values, groups):
    found = compare(Pairs.of([str(i) for i in range(40)], values, values, groups))
    assert (found.difference, found.p, found.found, found.gained, found.lost) == (0.0, 1.0, False, 0, 0)
    assert found.rows_needed is None
    assert found.low <= 0 <= found.high


def test_two_points_over_5000_rows_are_found_and_over_200_are_not():
    many, few = compare(flips(5000, 300, 200, 2400)), compare(flips(200, 12, 8, 96))
    assert many.difference == pytest.approx(0.02) == few.difference
    assert many.found
    assert many.low > 0
    assert many.rows_needed is None
    assert not few.found
    assert few.low < 0 < few.high
    # (1.96 + 0.8416)^2 * (flips / n - d^2) / d^2 rows
    assert few.rows_needed == pytest.approx((1.959964 + 0.841621) ** 2 * (0.1 - 0.0004) / 0.0004, rel=0.01)
    assert compare(flips(few.rows_needed, *(round(few.rows_needed * share) for share in (0.06, 0.04)))).found


def test_the_rows_that_flipped_are_named_five_each_way():
    found = compare(flips(40, 7, 6))
    assert (found.gained, found.lost) == (7, 6)
    assert found.first_gained == ("0", "1", "2", "3", "4")
    assert found.first_lost == ("7", "8", "9", "10", "11")


def test_one_lucky_subject_is_not_a_gain():
    """30 rows gained, none lost: beyond doubt row by row, but all in one of six subjects."""
    pairs = flips(600, 30, 0)
    alone = compare(pairs)
    grouped = compare(Pairs(pairs.ids, pairs.ours, pairs.theirs, [f"subject {i // 100}" for i in range(600)]))
    assert alone.found
    assert grouped.p == alone.p < 1e-6
    assert grouped.clusters == 6
    assert not grouped.found
    # cluster totals 30, 0, 0, 0, 0, 0 about their mean 5: sqrt(750 * 6 / 5) / 600, Student's t with 5 degrees
    assert grouped.high - grouped.difference == pytest.approx(2.570581835636314 * math.sqrt(750 * 6 / 5) / 600)


def test_values_are_compared_by_a_bootstrap_that_is_paired():
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 10, 400)  # what both rows share
    ours, theirs = hard + 0.3 + generator.normal(0, 1, 400), hard + generator.normal(0, 1, 400)
    found = compare(Pairs.of([str(i) for i in range(400)], ours, theirs))
    error = float((ours - theirs).std(ddof=1)) / 20
    assert found.test == "bootstrap"
    assert found.found
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    apart = math.hypot(ours.std(), theirs.std()) / 20
    assert found.difference < apart  # an unpaired z would not see it


def test_a_weighted_mean_is_a_ratio_of_sums():
    """Values per token, weights tokens: the long row counts by its length."""
    found = compare(Pairs.of(["a", "b"], [2.0, 1.0], [1.0, 1.0], weights=[30.0, 10.0]))
    assert (found.ours, found.theirs, found.difference) == (1.75, 1.0, 0.75)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_rows_that_agree_prove_nothing(count):
    ids = [str(i) for i in range(count)]
    assert not compare(Pairs.of(ids, [0.5] * count, [0.25] * count)).found
    assert compare(Pairs.of(ids, [0.5] * count, [0.25] * count)).p == pytest.approx(2 / 2**count)


def test_rows_of_different_number_are_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="one value of each model per row"):
        compare(Pairs.of(["a"], [1.0], [1.0, 0.0]))
    with pytest.raises(ValueError, match="needs rows"):
        compare(Pairs.of([], [], []))
