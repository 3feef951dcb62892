"""Length grouping: a permutation, similar lengths together, another order per epoch, the same on every run."""

from __future__ import annotations

from itertools import pairwise

import torch

from gemma2.posttrain.data.batching import LengthSampler, length_grouped_order

LENGTHS = torch.randint(1, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def order(seed=0):
    return length_grouped_order(LENGTHS, 8, torch.Generator().manual_seed(seed))


def padding(rows):
    """Padded positions per real one, over batches of 8."""
    batches = [[LENGTHS[i] for i in rows[start : start + 8]] for start in range(0, len(rows), 8)]
    return sum(max(batch) * len(batch) - sum(batch) for batch in batches) / sum(LENGTHS)


def test_every_row_comes_once():
    assert sorted(order()) == list(range(len(LENGTHS)))


def test_batches_hold_rows_of_similar_length():
    shuffled = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0)).tolist()
    assert padding(order()) < 0.1 * padding(shuffled)


def test_batches_do_not_run_from_long_to_short():
    firsts = [LENGTHS[i] for i in order()[: 50 * 8 : 8]]
    descents = sum(a > b for a, b in pairwise(firsts))
    assert 12 < descents < 38


def test_the_order_follows_from_seed_and_epoch():
    def epochs(seed):
        sampler = LengthSampler(LENGTHS, 8, seed)
        return [sampler.set_epoch(epoch) or list(sampler) for epoch in (0, 1)]

    assert epochs(0) == epochs(0)
    first, second, other, another = *epochs(0), *epochs(1)
    assert len({tuple(o) for o in (first, second, other, another)}) == 4


def test_fewer_rows_than_a_batch_are_one_batch():
    assert sorted(length_grouped_order([3, 1], 8, torch.Generator())) == [0, 1]


def test_several_processes_share_the_batches_of_one_and_fillers_complete_the_last():
    """With 3 rows on each of 2 processes per pass: the same rows per batch of 12, then the filler, row 1003."""
    alone = LengthSampler(LENGTHS, 12, seed=3)
    shared = LengthSampler([*LENGTHS, 7], 12, seed=3, together=6)
    rows, padded = list(alone), list(shared)
    assert padded[: len(rows)] == rows
    assert set(padded[len(rows) :]) == {len(LENGTHS)}
    assert len(padded) == len(shared) == -(-len(LENGTHS) // 6) * 6
    assert -(-len(padded) // 12) == -(-len(rows) // 12)  # as many optimizer steps
