"""Curves of bounded size, bars, and the time that is left."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2.posttrain.watch.curve import Curve, sparkline
from gemma2.posttrain.watch.pace import Pace, pace_of, seconds_between

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def curve(values, most=400):
    made = Curve(most)
    for step, value in enumerate(values, 1):
        made.add(step, value)
    return made.points()


def test_a_short_curve_is_kept_as_it_is():
    assert curve([3.0, 1.0, 2.0]) == [(1, 3.0), (2, 1.0), (3, 2.0)]


@given(st.integers(1, 3000))
def test_a_long_curve_keeps_its_size_its_mean_and_its_last_step(count):
    points = curve(map(float, range(count)), most=16)
    assert len(points) <= 16
    assert points[-1][0] == count
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    widths = [b - a for a, b in zip([0, *(step for step, _ in points)], [step for step, _ in points], strict=False)]
    mean = sum(width * value for width, (_, value) in zip(widths, points, strict=True)) / count
    assert mean == pytest.approx((count - 1) / 2)


def test_what_is_not_finite_is_left_out():
    assert curve([1.0, math.nan, math.inf, 2.0]) == [(1, 1.0), (4, 2.0)]


@given(st.lists(FINITE, min_size=1), st.integers(1, 60))
def test_bars_are_as_many_as_fit(values, width):
    bars = sparkline(values, width)
    assert len(bars) == min(width, len(values))
    assert set(bars) <= set("▁▂▃▄▅▆▇█")


def test_bars_rise_with_the_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([5.0, 5.0], 8) == "▁▁"
    assert sparkline([math.nan], 8) == sparkline([], 8) == ""


def live(step, steps, *times):
    return {"step": step, "steps": steps, "times": [list(one) for one in times]}


def test_the_time_left_follows_from_the_recent_rate():
    found = pace_of(live(30, 100, (100.0, 10), (110.0, 30)), now=110.0)
    assert found == Pace(30, 100, rate=2.0, eta=35.0)


def test_what_passed_since_the_last_step_is_taken_off():
    assert pace_of(live(30, 100, (100.0, 10), (110.0, 30)), now=120.0).eta == 25.0
    assert pace_of(live(30, 100, (100.0, 10), (110.0, 30)), now=900.0).eta == 0.0
    assert pace_of(live(30, 100, (100.0, 10), (110.0, 30)), now=50.0).eta == 35.0  # another machine's clock


@pytest.mark.parametrize(
    "record",
    [
        {},
        live(0, 100, (5.0, 0)),  # nothing is done yet
        live(7, 100, (5.0, 7), (5.0, 7)),
        live(7, 100, (9.0, 3), (5.0, 7)),  # the clock was set back
        {"step": "7", "steps": None, "times": 3},
        {"step": True, "steps": 5, "times": []},
        live(3, 9, (math.nan, 1), (math.inf, 2)),
        {"step": 3, "steps": 9, "times": [[1], "x", None, [1, "2"]]},
    ],
)
def test_without_two_steps_the_time_left_is_unknown(record):
    assert pace_of(record, now=10.0).eta is None


def test_times_that_cannot_be_read_are_unknown():
    assert seconds_between("2026-11-29T10:00:00Z", "2026-11-29T10:01:00Z") == 60
    assert seconds_between(None, "2026-11-29T10:01:00Z") is seconds_between("2026-11-29T10:00:00Z", 7) is None
