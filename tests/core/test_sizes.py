"""Sizes and pairs of numbers in sentences."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemma2.core.sizes import apart, size, sizes_apart


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"), (999_999, "1.00 MB"),
     (5_230_000_000, "5.23 GB"), (123_456_789_000, "123 GB"), (4.2e12, "4.20 TB")],
)  # fmt: skip
def test_a_size_has_three_digits_and_a_unit_that_fits(count, text):
    assert size(count) == text


@given(st.integers(1, 10**17))
def test_no_size_reads_as_nothing(count):
    number, _, unit = size(count).partition(" ")
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}[unit]
    assert float(number) >= 1
    assert float(number) * scale == pytest.approx(count, rel=6e-3)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
@example(0.0, -0.0)
def test_numbers_that_differ_read_differently(a, b):
    first, second = apart(a, b)
    assert (first == second) == (a == b)


@given(st.integers(0, 10**15), st.integers(0, 10**6))
def test_sizes_that_differ_read_differently(count, more):
    first, second = sizes_apart(count, count + more)
    assert (first == second) == (more == 0)


def test_digits_stay_few_where_few_tell():
    assert apart(0.5, 0.25) == ("0.5", "0.25")
    assert apart(0.163601, 0.163642) == ("0.1636", "0.16364")
    assert sizes_apart(3, 0) == ("3 B", "0 B")
