"""Mixtures: shares by weight, nothing twice before everything once, the same for every resume."""

from __future__ import annotations

from collections import Counter

import pytest

from gemma2.core.errors import UsageError
from gemma2.posttrain.data.batching import LengthSampler
from gemma2.posttrain.data.mixture import Mixture, apportion


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ((3, 1), 40, [30, 10]),
        ((1, 1, 1), 10, [4, 3, 3]),  # 3.33 each: the first of equal remainders gets the row that is left
        ((0.7, 0.2, 0.1), 7, [5, 1, 1]),  # 4.9, 1.4, 0.7
        ((2, 2), 1, [1, 0]),
    ],
)
def test_rows_are_shared_by_largest_remainders(weights, total, expected):
    assert apportion(weights, total) == expected


def test_without_weights_every_epoch_holds_every_row_once():
    mixture = Mixture.of([3, 2], (), seed=0)
    assert [mixture.rows(epoch) for epoch in range(3)] == [[0, 1, 2, 3, 4]] * 3


def test_an_epoch_is_as_long_as_without_weights_and_shared_by_weight():
    mixture = Mixture.of([30, 10], (1, 3), seed=0)
    for epoch in range(4):
        rows = mixture.rows(epoch)
        assert len(rows) == len(mixture) == 40
        assert sum(row < 30 for row in rows) == 10 and sum(row >= 30 for row in rows) == 30


def test_no_row_comes_again_before_all_others_of_its_data_set_came():
    mixture = Mixture.of([30, 10], (1, 3), seed=5)
    seen: Counter[int] = Counter()
    for epoch in range(6):
        seen.update(mixture.rows(epoch))
        for rows in (range(30), range(30, 40)):
            counts = [seen[row] for row in rows]
            assert max(counts) - min(counts) <= 1
    assert {seen[row] for row in range(30)} == {2}  # 6 epochs x 10 rows of 30
    assert {seen[row] for row in range(30, 40)} == {18}


def test_the_rows_follow_from_seed_and_epoch():
    def drawn(seed, epoch):
        return Mixture.of([30, 10], (1, 3), seed).rows(epoch)

    assert drawn(0, 1) == drawn(0, 1)
    assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_weight_that_gives_no_row_is_refused():
    with pytest.raises(UsageError, match="data set 2 gets none of the 40 rows of an epoch"):
        Mixture.of([30, 10], (1, 0.001), seed=0)


def test_the_sampler_yields_the_rows_of_the_mixture_in_batches_of_similar_length():
    mixture = Mixture.of([30, 10], (1, 3), seed=0)
    sampler = LengthSampler([i + 1 for i in range(40)], 4, 0, mixture)
    sampler.set_epoch(2)
    order = list(sampler)
    assert len(sampler) == 40 and sorted(order) == mixture.rows(2)
    assert all(max(order[i : i + 4]) - min(order[i : i + 4]) <= 8 for i in range(0, 40, 4))
