"""Sparse merges against a float64 reference written from the papers; they are exact and independent of cuts."""

from dataclasses import replace

import numpy as np
import pytest
from model_files import from_bytes, to_bytes, write_model

from gemma2.core.errors import InputError
from gemma2.merging import MergeRequest, merge
from gemma2.merging.kernels.dense import BLOCK
from gemma2.merging.kernels.dtypes import widen
from gemma2.merging.kernels.number_formats import ITEMS, KINDS, STORED
from gemma2.merging.kernels.philox import stream_key, uniforms
from gemma2.merging.kernels.sparse import scratch, sparse_combine
from gemma2.merging.kernels.sparsity import Sparsity
from gemma2.merging.kernels.top_k import (
    BINS,
    COARSE,
    MIXED,
    PIECE,
    WINDOW,
    count_near,
    counting_space,
    kept_ranks,
    magnitude,
    near_rank,
    place_of_rank,
    sample,
    sample_places,
    window_near,
)
from gemma2.merging.streaming import sparse_stream, writer
from gemma2.merging.streaming.sparse_stream import SAMPLE

SIZES = {"BF16": 2, "F16": 2, "F32": 4}


def operands(raw, kinds, count):
    """The input of the kernels: bits if all are bf16, else fp32."""
    if not kinds.any():
        return raw.view(np.uint16)
    rows = np.empty((len(kinds), count), np.float32)
    for kind, stored, row in zip(kinds, raw, rows, strict=True):
        widen(stored[: count * ITEMS[kind]], kind, row)
    return rows


def models_of(count, dtypes, seed=0, spread=1e-3):
    """A base and models near it: stored rows and their values in fp64."""
    generator = np.random.default_rng(seed)
    base = generator.standard_normal(count) * 0.02
    raw = np.zeros((len(dtypes), count * 4), np.uint8)
    values = []
    for row, dtype in enumerate(dtypes):
        own = base if row == 0 else base + spread * generator.standard_normal(count)
        data = to_bytes(own, dtype)
        raw[row, : len(data)] = np.frombuffer(data, np.uint8)
        values.append(from_bytes(data, dtype, [count]))
    return raw, np.array([KINDS[dtype] for dtype in dtypes]), np.array(values)


def pieces(raw, dtypes, first, count):
    """The bytes of elements [first, first + count) of every row."""
    out = np.zeros((len(dtypes), count * 4), np.uint8)
    for row, dtype in enumerate(dtypes):
        size = SIZES[dtype]
        out[row, : count * size] = raw[row, first * size : (first + count) * size]
    return out


def keys_of(models, seed=0):
    return np.stack([stream_key(seed, "tensor", model) for model in range(models)])


def merged(raw, kinds, sparsity, *, count, out_dtype="F32", first=0, row=None, seed=0):
    """The stored result in fp64, and the squares."""
    models = len(kinds) - 1
    unit = row if sparsity.by_rows else BLOCK
    out = np.zeros(count, STORED[out_dtype])
    squares = np.empty(-(-count // unit))
    rows = np.empty((models + 3, BLOCK), np.float32)
    settings = (sparsity.table(), keys_of(models, seed), sparsity.consensus)
    work = scratch(models, unit, sparsity.by_rows)
    assert sparse_combine(operands(raw, kinds, count), (count, first, unit), settings, rows, work, out, squares)
    return from_bytes(out.tobytes(), out_dtype, [count]), squares


MEMORY = np.full((65, 2), -1)  # in place of files: the operands are in the work space


def counted(raw, kinds, windows, count):
    """The numbers of elements above the windows and in their bins, (Q, 1 + WINDOW)."""
    out = np.zeros((len(windows), 1 + BINS), np.int64)
    count_near(operands(raw, kinds, count), count, np.array(windows), out, counting_space())
    return out[:, : 1 + WINDOW] % MIXED


def within(raw, kinds, window, rank, count):
    """The pattern of the rank-th largest if it is in the window."""
    row = counted(raw, kinds, [window], count)[0]
    place = place_of_rank(row[1:], int(row[0]), rank)
    return None if place is None else window[1] + (place << window[2])


def threshold(raw, kinds, model, rank, count):
    coarse = within(raw, kinds, [model, 0, COARSE], rank, count)
    return magnitude(within(raw, kinds, [model, coarse, 0], rank, count))


def deltas32(values):
    """Deltas as in the kernels: one fp32 rounding."""
    return (values[1:] - values[0]).astype(np.float32).astype(np.float64)


def draws(models, count, seed=0):
    """Random numbers in [0, 1), halfway between two multiples of 2**-16."""
    space = np.empty(count // 2 + 7, np.uint32)
    return np.array([(uniforms(key, 0, count, space) + 0.5) / 65536 for key in keys_of(models, seed)])


def consensus64(terms, weights, elect, normalize, margin):
    """From masked, rescaled task vectors (M, n): the merged one, and where rounding cannot change the election."""
    weighted = np.array(weights)[:, None] * terms
    total = weighted.sum(axis=0)
    if not elect:
        return total / sum(weights) if normalize else total, np.ones(total.size, bool)
    clear = np.abs(total) > margin * np.abs(weighted).sum(axis=0)
    agrees = (np.sign(weighted) == np.sign(total)) & (weighted != 0)
    kept = np.where(agrees, weighted, 0).sum(axis=0)
    if normalize:
        share = (agrees * np.array(weights)[:, None]).sum(axis=0)
        kept = np.divide(kept, share, out=np.zeros_like(kept), where=share != 0)
    return kept, clear | (total == 0)


# Elements of TIES by hand: base 0, trimmed at 1; weights 1.
#   (2, 4)     agree: mean 3               (3, -2)   sum > 0: only 3 stays
#   (-3, 2)    sum < 0: only -3            (0.5, 2)  the first is trimmed: 2
#   (2, -2)    no sign: 0                  (0.5, .5) both trimmed: 0
def test_ties_agrees_with_a_calculation_by_hand():
    first = np.array([2, 3, -3, 0.5, 2, 0.5], np.float32)
    second = np.array([4, -2, 2, 2, -2, 0.5], np.float32)
    raw = np.stack([np.zeros(6, np.float32), first, second]).view(np.uint8)
    kinds = np.full(3, KINDS["F32"])
    ties = Sparsity(weights=(1, 1), low=(1, 1), elect=True, normalize=True)
    result, squares = merged(raw, kinds, ties, count=6)
    assert result.tolist() == [3, 3, -3, 2, 0, 0]
    assert squares.tolist() == [9 + 9 + 9 + 4]
    summed = Sparsity(weights=(1, 1), low=(1, 1), elect=True, scale=0.5)
    assert merged(raw, kinds, summed, count=6)[0].tolist() == [3, 1.5, -1.5, 1, 0, 0]
    uneven = Sparsity(
        weights=(1, 2), low=(1, 1), elect=True, normalize=True
    )  # the second counts twice, in the vote too
    assert merged(raw, kinds, uneven, count=6)[0] == pytest.approx([10 / 3, -2, 2, 2, -2, 0])


def test_a_band_keeps_both_of_its_ends():
    values = np.array([0.5, 1, 2, 3, -1, -3, 4, 0], np.float32)
    raw = np.stack([np.full(8, 8, np.float32), values + 8]).view(np.uint8)
    band = Sparsity(weights=(1,), low=(1,), high=(3,))
    result, _ = merged(raw, np.full(2, KINDS["F32"]), band, count=8)
    assert (result - 8).tolist() == [0, 1, 2, 3, -1, -3, 0, 0]


@pytest.mark.parametrize(("density", "gamma", "expected"), [
    (0.2, 0.0, (1, 2)),
    (0.29, 0.0, (1, 2)),
    (1.0, 0.0, (1, 10)),
    (0.01, 0.0, (1, 1)),
    (0.7, 0.1, (2, 8)),
    (0.9, 0.5, (2, 10)),  # gamma is cut to 1 - density
])  # fmt: skip
def test_the_kept_ranks_of_ten_elements(density, gamma, expected):
    assert kept_ranks(10, density, gamma) == expected


def test_rounding_of_the_density_does_not_lose_an_element():
    assert 0.29 * 100 < 29
    assert kept_ranks(100, 0.29) == (1, 29)


def test_place_of_rank_agrees_with_a_count_by_hand():
    counts = np.array([5, 0, 3, 2])
    assert [place_of_rank(counts, 0, rank) for rank in (1, 2, 3, 5, 6, 10)] == [3, 3, 2, 2, 0, 0]
    assert [place_of_rank(counts, 4, rank) for rank in (4, 5, 6, 7, 14, 15)] == [None, 3, 3, 2, 0, None]


@pytest.mark.parametrize(("count", "wanted"), [(10, 10), (PIECE, 1), (5 * PIECE + 3, 5 * PIECE), (100 * PIECE, 999)])
def test_pieces_of_a_sample_are_inside_the_tensor_and_disjoint(count, wanted):
    places = sample_places(count, wanted)
    sizes = np.minimum(count - places, PIECE)
    assert places[0] == 0
    assert sizes.min() > 0
    assert wanted <= sizes.sum() <= wanted + PIECE
    assert (np.diff(places) >= sizes[:-1]).all()


def test_a_sample_holds_the_magnitudes_of_its_pieces():
    dtypes, count = ("BF16", "F32", "F16"), 20 * PIECE + 7
    raw, kinds, values = models_of(count, dtypes)
    deltas = np.abs(deltas32(values)).astype(np.float32).view(np.uint32)
    stored = operands(raw, kinds, count)
    for wanted in (count, 5 * PIECE):
        places = sample_places(count, wanted)
        found = []
        for place in places:  # operands that the caller converts come piece by piece
            size = min(PIECE, count - place)
            out = np.empty((2, size), np.uint32)
            assert sample(MEMORY[:3], np.array([place]), count, stored[:, place : place + size].copy(), out) == 0
            found.append(out)
        expected = np.concatenate([deltas[:, place : place + PIECE] for place in places], axis=1)
        assert np.array_equal(np.concatenate(found, axis=1), expected)
    assert [near_rank(deltas[0], rank, count) for rank in (1, 7, count)] == np.sort(deltas[0])[[-1, -7, 0]].tolist()


@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F16",) * 3, ("F32",) * 3, ("BF16", "F32", "F16")], ids=str)
def test_the_threshold_is_the_kth_largest_magnitude(dtypes):
    count = 3 * BLOCK + 77
    raw, kinds, values = models_of(count, dtypes)
    deltas = np.abs(deltas32(values))
    for model in (1, 2):
        descending = np.sort(deltas[model - 1])[::-1]
        for rank in (1, 2, 1000, count // 2, count - 1, count):
            assert threshold(raw, kinds, model, rank, count) == descending[rank - 1]


def test_the_threshold_of_equal_magnitudes_and_of_no_change():
    values = np.array([1, -1, 1, 1, 0, 0, 2, -1], np.float32)
    raw = np.stack([np.zeros(8, np.float32), values, np.zeros(8, np.float32)]).view(np.uint8)
    kinds = np.full(3, KINDS["F32"])
    assert [threshold(raw, kinds, 1, rank, 8) for rank in (1, 2, 6, 7, 8)] == [2, 1, 1, 0, 0]
    assert [threshold(raw, kinds, 2, rank, 8) for rank in (1, 8)] == [0, 0]
    unchanged = Sparsity(weights=(1, 1), low=(0, 0), elect=True, normalize=True)
    assert merged(raw[[0, 2, 2]], kinds, unchanged, count=8)[0].tolist() == [0] * 8


def test_counts_add_up_over_cuts():
    dtypes = ("BF16", "F32", "F16")
    count = 5 * BLOCK + 3
    raw, kinds, values = models_of(count, dtypes)
    patterns = np.abs(deltas32(values)).astype(np.float32).view(np.uint32)
    low = int(np.median(patterns[0])) - WINDOW // 2
    windows = [[1, low, 0], [2, 0, COARSE]]
    whole = counted(raw, kinds, windows, count)
    assert whole[0, 0] == (patterns[0] >= low + WINDOW).sum()
    inside = patterns[0][(patterns[0] >= low) & (patterns[0] < low + WINDOW)]
    assert 0 < inside.size < count / 10
    assert np.array_equal(whole[0, 1:], np.bincount(inside - low, minlength=WINDOW))
    assert np.array_equal(whole[1, 1:], np.bincount(patterns[1] >> COARSE, minlength=WINDOW))
    parts = sum(
        counted(pieces(raw, dtypes, first, size), kinds, windows, size)
        for first, size in ((0, 2 * BLOCK), (2 * BLOCK, 3 * BLOCK + 3))
    )
    assert np.array_equal(whole, parts)


METHODS = {
    "ties": Sparsity(weights=(1.0, 0.5), low=(1e-3, 5e-4), elect=True, normalize=True, scale=0.9),
    "task arithmetic": Sparsity(weights=(0.3, -0.4), scale=2.0),
    "task arithmetic, normalised": Sparsity(weights=(1.0, 3.0), normalize=True),
    "breadcrumbs": Sparsity(weights=(0.5, 0.5), low=(2e-4, 3e-4), high=(1.5e-3, 2e-3)),
    "breadcrumbs_ties": Sparsity(weights=(1.0, 1.0), low=(2e-4, 3e-4), high=(1.5e-3, 2e-3), elect=True),
    "dare_linear": Sparsity(weights=(0.5, 0.5), keep=(0.3, 0.6)),
    "dare_linear, not rescaled": Sparsity(weights=(0.5, 0.5), keep=(0.3, 0.6), rescale=False),
    "dare_ties": Sparsity(weights=(0.5, 0.7), keep=(0.3, 0.6), elect=True, normalize=True),
    "della": Sparsity(weights=(1.0, 0.7), keep=(0.5, 0.6), spread=(0.2, 0.1), elect=True, normalize=True),
    "della_linear": Sparsity(weights=(0.5, 0.5), keep=(0.5, 0.6), spread=(0.2, 0.1)),
    "della_linear, not rescaled": Sparsity(weights=(0.5, 0.5), keep=(0.4, 0.6), spread=(0.2, 0.1), rescale=False),
}
ROW = 700  # neither a multiple of four nor a divisor of BLOCK


def reference(values, sparsity, count, row):
    """By the papers' definitions in fp64: merged task vector, sizes of its terms, where rounding changes nothing."""
    deltas = deltas32(values)
    models = len(deltas)
    draw = draws(models, count)
    clear = np.ones(count, bool)
    terms = np.zeros_like(deltas)
    for m, delta in enumerate(deltas):
        low = sparsity.low[m] if sparsity.low else 0.0
        high = sparsity.high[m] if sparsity.high else np.inf
        inside = (np.abs(delta) >= np.float32(low)) & (np.abs(delta) <= np.float32(high))
        chance = np.full(count, sparsity.keep[m] if sparsity.keep else 1.0)
        if sparsity.by_rows:
            for begin in range(0, count, row):
                piece = np.abs(delta[begin : begin + row])
                order = np.sort(piece)
                left, right = np.searchsorted(order, piece), np.searchsorted(order, piece, side="right")
                ranks = (left + right - 1) / 2 / (piece.size - 1)  # equal magnitudes share their mean rank
                chance[begin : begin + row] += sparsity.spread[m] * (2 * ranks - 1)
            clear &= np.abs(draw[m] - chance) > 0.05 * sparsity.spread[m]  # (c - 1) / (row - 1), c in a bucket
        if sparsity.keep:
            chance = np.rint(chance * 65536) / 65536  # the resolution of 16 random bits
        terms[m] = np.where(inside & (draw[m] < chance), delta / (chance if sparsity.rescale else 1.0), 0)
    margin = 0.05 if sparsity.by_rows and sparsity.rescale else 1e-6  # as far as the terms are the kernel's
    kept, elected = consensus64(terms, sparsity.weights, sparsity.elect, sparsity.normalize, margin)
    return sparsity.scale * kept, np.abs(terms).sum(axis=0), clear & elected


@pytest.mark.parametrize("dtypes", [("BF16",) * 3, ("F16", "F32", "BF16"), ("F32",) * 3], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_merges_agree_with_a_float64_reference(method, dtypes):
    count = 13 * ROW
    raw, kinds, values = models_of(count, dtypes, seed=5)
    sparsity = METHODS[method]
    result, squares = merged(raw, kinds, sparsity, count=count, row=ROW)
    expected, sizes, clear = reference(values, sparsity, count, ROW)
    assert clear.mean() > 0.95
    # The keep probabilities of DELLA, and so the rescaled terms, differ by up to epsilon * bucket / row.
    tolerance = 0.05 if sparsity.by_rows and sparsity.rescale else 1e-6
    merged_delta = result - values[0]
    bound = tolerance * sizes + 1e-8  # the result is an fp32 of the order of the base
    assert (np.abs(merged_delta - expected) <= bound)[clear].all()
    if not sparsity.by_rows:
        assert squares.sum() == pytest.approx((expected**2)[clear].sum(), rel=1e-2)


@pytest.mark.parametrize("scale", [0.7, 1 / 3, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_terms_that_cancel_exactly_are_dropped_whatever_the_scale(scale, normalize):
    generator = np.random.default_rng(6)
    deltas = generator.integers(-4, 5, (3, 20_000)) / 8  # with weights of powers of two, sums are exact
    raw = np.concatenate([np.zeros((1, 20_000)), deltas]).astype(np.float32).view(np.uint8)
    weights = (1.0, 0.5, 0.25)
    sparsity = Sparsity(weights=weights, elect=True, normalize=normalize, scale=scale)
    result, _ = merged(raw, np.full(4, KINDS["F32"]), sparsity, count=20_000)
    expected, _ = consensus64(deltas, weights, True, normalize, 0.0)
    cancel = (np.array(weights)[:, None] * deltas).sum(axis=0) == 0
    assert 100 < cancel.sum() < 5000
    assert np.array_equal(result[cancel], np.zeros(cancel.sum()))
    assert np.abs(result - scale * expected).max() < 1e-6


@pytest.mark.parametrize("out_dtype", ["BF16", "F16"])
def test_results_are_rounded_once_to_nearest_even(out_dtype):
    count = 2 * BLOCK
    raw, kinds, _ = models_of(count, ("BF16",) * 3)
    ties = METHODS["ties"]
    precise, _ = merged(raw, kinds, ties, count=count)
    stored, _ = merged(raw, kinds, ties, count=count, out_dtype=out_dtype)
    assert np.array_equal(stored, from_bytes(to_bytes(precise, out_dtype), out_dtype, [count]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("out_dtype", ["BF16", "F32"])
def test_a_merge_in_pieces_is_the_same_bit_for_bit(method, out_dtype):
    dtypes = ("BF16", "BF16", "F32") if out_dtype == "F32" else ("BF16",) * 3
    sparsity = METHODS[method]
    unit = ROW if sparsity.by_rows else BLOCK
    count = 7 * unit if sparsity.by_rows else 3 * BLOCK + 11
    raw, kinds, _ = models_of(count, dtypes)
    whole, squares = merged(raw, kinds, sparsity, count=count, out_dtype=out_dtype, row=ROW)
    parts = []
    for first, size in ((0, unit), (unit, 2 * unit), (3 * unit, count - 3 * unit)):
        piece = pieces(raw, dtypes, first, size)
        parts.append(merged(piece, kinds, sparsity, count=size, out_dtype=out_dtype, first=first, row=ROW))
    assert np.concatenate([part[0] for part in parts]).tobytes() == whole.tobytes()
    assert np.concatenate([part[1] for part in parts]).tobytes() == squares.tobytes()


def kept_of(sparsity, count, row=None, seed=0, deltas=None):
    """Merged task vectors of one model that is `deltas` away from 0, in fp32."""
    values = np.ones(count, np.float32) if deltas is None else deltas.astype(np.float32)
    raw = np.stack([np.zeros(count, np.float32), values]).view(np.uint8)
    return merged(raw, np.full(2, KINDS["F32"]), sparsity, count=count, row=row, seed=seed)[0]


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_dare_keeps_with_its_probability_and_rescaling_keeps_the_mean(density):
    count = 200_000
    result = kept_of(Sparsity(weights=(1.0,), keep=(density,)), count)
    kept = result != 0
    sigma = np.sqrt(density * (1 - density) / count)
    assert abs(kept.mean() - density) < 4 * sigma
    assert np.unique(result[kept]) == pytest.approx([1 / density], abs=2**-17 / density**2)
    assert abs(result.mean() - 1) < 4 * sigma / density


@pytest.mark.parametrize("density", [1e-5, 0.001, 0.3333])
def test_rescaling_divides_by_the_attained_probability(density):
    met = max(round(density * 65536), 1) / 65536
    result = kept_of(Sparsity(weights=(1.0,), keep=(density,)), 1_000_000)
    assert set(np.unique(result)) - {0.0} == {float(np.float32(1 / met))}


def test_masks_are_equal_for_equal_keys_and_differ_by_seed():
    dare = Sparsity(weights=(1.0,), keep=(0.5,))
    first, again, other = (kept_of(dare, 10_000, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert abs((first == other).mean() - 0.5) < 4 * 0.5 / 100


def test_a_density_of_one_keeps_everything():
    assert kept_of(Sparsity(weights=(1.0,), keep=(1.0,)), 1000).tolist() == [1.0] * 1000


def test_della_keeps_larger_elements_more_and_the_density_on_average():
    row, rows, density, epsilon = 1000, 300, 0.5, 0.3
    deltas = np.tile(np.linspace(1e-3, 1.0, row), rows)  # ranks are places
    settings = Sparsity(weights=(1.0,), keep=(density,), spread=(epsilon,), rescale=False)
    kept = (kept_of(settings, row * rows, row=row, deltas=deltas) != 0).reshape(rows, row)
    expected = density - epsilon + 2 * epsilon * np.arange(row) / (row - 1)
    tenths, wanted = kept.mean(axis=0).reshape(10, -1).mean(axis=1), expected.reshape(10, -1).mean(axis=1)
    assert np.abs(tenths - wanted).max() < 4 * np.sqrt(0.25 / (row * rows / 10)) + 0.005
    assert abs(kept.mean() - density) < 4 * np.sqrt(0.25 / kept.size)


def chances(deltas, density=0.5, epsilon=0.3):
    """Keep probabilities of one row, derived from its rescaled elements over many seeds."""
    settings = Sparsity(weights=(1.0,), keep=(density,), spread=(epsilon,))
    seen = np.zeros(len(deltas))
    for seed in range(64):
        result = kept_of(settings, len(deltas), row=len(deltas), deltas=deltas, seed=seed)
        seen = np.where(result != 0, deltas / np.where(result == 0, 1, result), seen)
    return seen


def test_della_probabilities_agree_with_a_calculation_by_hand():
    # ranks 0, 1, 2, 3 of four: density - epsilon + 2 epsilon * rank / 3
    assert chances(np.array([-1.0, 8.0, 2.0, -4.0])) == pytest.approx([0.2, 0.8, 0.4, 0.6], abs=2**-17)
    # equal magnitudes share their mean rank: (0 + 1) / 2, (2 + 3) / 2
    assert chances(np.array([1.0, -1.0, 4.0, 4.0])) == pytest.approx([0.3, 0.3, 0.7, 0.7], abs=2**-17)
    assert chances(np.array([3.0])) == pytest.approx([0.5])


def test_della_probabilities_are_monotone_and_average_to_the_density():
    deltas = np.random.default_rng(3).standard_cauchy(300)
    probabilities = chances(deltas)
    assert (np.diff(probabilities[np.argsort(np.abs(deltas))]) >= -1e-6).all()
    assert probabilities.mean() == pytest.approx(0.5, abs=2**-17)


def test_della_with_rows_longer_than_a_block():
    row = 2 * BLOCK + 5
    raw, kinds, values = models_of(2 * row, ("F32",) * 3, seed=2)
    sparsity = METHODS["della_linear, not rescaled"]
    result, squares = merged(raw, kinds, sparsity, count=2 * row, row=row)
    expected, _, clear = reference(values, sparsity, 2 * row, row)
    assert np.abs(result - values[0] - expected)[clear].max() < 1e-8
    assert squares.size == 2


def test_unchanged_elements_keep_the_sign_of_zero():
    zeros = np.array([-0.0, 0.0, -0.0], np.float32)
    raw = np.stack([zeros, zeros]).view(np.uint8)
    result, _ = merged(raw, np.full(2, KINDS["F32"]), Sparsity(weights=(1.0,)), count=3)
    assert np.signbit(result).tolist() == [True, False, True]


@pytest.mark.parametrize("method", ["ties", "dare"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_value_that_is_not_finite_is_noticed_even_where_it_is_dropped(tmp_path, method, bad, place):
    values = np.ones((3, 100), np.float32)
    values[place, 17] = bad
    written(tmp_path, values)
    with pytest.raises(InputError, match="at element 17"):
        merged_file(tmp_path, "out", method=method, density=(0.01, 0.01))


@pytest.mark.parametrize(("dtype", "fits"), [("BF16", True), ("F16", False)])
def test_a_result_that_does_not_fit_is_noticed(dtype, fits):
    stored = np.stack([np.full(4, 6e4, np.float32), np.full(4, 7e4, np.float32)])
    settings = (Sparsity(weights=(1.0,)).table(), keys_of(1), 0)
    rows, out = np.empty((4, BLOCK), np.float32), np.zeros(4, STORED[dtype])
    assert sparse_combine(stored, (4, 0, BLOCK), settings, rows, scratch(1, BLOCK, False), out, np.zeros(1)) is fits


def written(root, arrays, dtypes=("BF16", "BF16", "BF16")):
    """A base and two models on disk, from one flat array each or a dict of several."""
    for name, own, dtype in zip(("base", "one", "two"), arrays, dtypes, strict=True):
        write_model(root / name, own if isinstance(own, dict) else {"w.weight": own}, dtype)


def merged_file(root, name, cut=None, **options):
    request = MergeRequest(models=(root / "one", root / "two"), base=root / "base", **options)
    merge(request, out=root / name, **({} if cut is None else {"cut": cut}))
    return (root / name / "model.safetensors").read_bytes()


MANY = 300_007  # elements: more than a sample holds
LOOKED_AT = np.concatenate([np.arange(p, min(p + PIECE, MANY)) for p in sample_places(MANY, SAMPLE[0])])


def misleading(generator):
    """The sampled elements are a hundred times larger than the others."""
    values = generator.standard_normal(MANY)
    values[LOOKED_AT] *= 100
    return values


ADVERSE = {
    "misleading": misleading,
    "misled to zero": lambda generator: np.where(np.isin(np.arange(MANY), LOOKED_AT), 0, generator.random(MANY) + 1),
    "all equal": lambda generator: np.full(MANY, 0.5),
    "no change": lambda generator: np.zeros(MANY),
    "many zeros": lambda generator: generator.standard_normal(MANY) * (generator.random(MANY) < 0.1),
    "heavy ties": lambda generator: generator.integers(-3, 4, MANY) / 8,
    "of all sizes": lambda generator: generator.standard_normal(MANY) * 2.0 ** generator.integers(-60, 60, MANY),
}


@pytest.mark.parametrize("kind", ADVERSE)
def test_thresholds_are_exact_for_any_estimate_of_the_sample(tmp_path, monkeypatch, kind):
    assert LOOKED_AT.size < MANY / 2
    found = []
    monkeypatch.setattr(sparse_stream, "replace", lambda sparsity, **own: found.append(own) or replace(sparsity, **own))
    generator = np.random.default_rng(0)
    deltas = [ADVERSE[kind](generator).astype(np.float32) for _ in range(2)]
    written(tmp_path, [np.zeros(MANY), *deltas], ("F32",) * 3)
    merged_file(tmp_path, "out", method="breadcrumbs", density=(0.3, 0.8), gamma=(0.1, 0.001))
    for m, delta in enumerate(deltas):
        descending = np.sort(np.abs(delta))[::-1]
        first, last = kept_ranks(MANY, (0.3, 0.8)[m], (0.1, 0.001)[m])
        assert found[0]["low"][m] == descending[last - 1]
        assert found[0]["high"][m] == descending[first - 1]


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare", "della"])
@pytest.mark.parametrize("dtypes", [("BF16",) * 3], ids=str)
def test_files_are_equal_for_any_cut_and_number_of_threads(tmp_path, method, dtypes):
    generator = np.random.default_rng(1)
    shapes = {"a.weight": (300, 2304), "b.weight": (40, 3001), "c.weight": (5000,)}
    base = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    models = [{name: own + 0.01 * generator.standard_normal(own.shape) for name, own in base.items()} for _ in "12"]
    written(tmp_path, [base, *models], dtypes)
    settings = [(None, 2), (4096, 1), (12288, 3)]
    files = {merged_file(tmp_path, f"{cut}", cut, method=method, threads=threads) for cut, threads in settings}
    assert len(files) == 1


def test_rows_that_do_not_fill_pages_are_written_with_and_without_the_page_cache(tmp_path, monkeypatch):
    generator = np.random.default_rng(1)
    base = generator.standard_normal((2048, 2049))  # whole pages in all, but not per row
    written(tmp_path, [base, base + 0.01, base + 0.01 * generator.standard_normal(base.shape)])
    expected = merged_file(tmp_path, "cached", method="della")
    monkeypatch.setattr(writer, "DIRECT_BYTES", 0)
    assert merged_file(tmp_path, "direct", method="della") == expected


def test_a_window_covers_what_the_sample_leaves_possible():
    """By hand: 1,000 of 100,000 elements sampled, the 20,000th wanted: the 200th in the sample, +- 76."""
    close = np.arange(1000, dtype=np.uint32) + 3 * WINDOW
    first, shift = window_near(close, 20_000, 100_000)
    assert (first, shift) == (3 * WINDOW + 800 - WINDOW // 2, 0)
    far = np.where(np.arange(1000) < 800, 5 * WINDOW, 9 * WINDOW).astype(np.uint32)
    first, shift = window_near(far, 20_000, 100_000)
    assert first <= 5 * WINDOW < 9 * WINDOW < first + (WINDOW << shift)
    assert first % (1 << shift) == 0
    assert 4 << shift <= 64  # not much wider than it has to be


def passes_over(tmp_path, monkeypatch, deltas, base=None):
    """How often a group is counted through."""
    counted, count = [], sparse_stream.ChoosingStream._count

    def noted(self, *given, **named):
        counted.append(1)
        return count(self, *given, **named)

    monkeypatch.setattr(sparse_stream.ChoosingStream, "_count", noted)
    base = np.ones(MANY) if base is None else base
    written(tmp_path, [base, *(base + delta for delta in deltas)], ("F32",) * 3)
    merged_file(tmp_path, "out", method="ties", density=(0.2, 0.2))
    return len(counted)


def test_differences_of_few_values_are_counted_once(tmp_path, monkeypatch):
    """The wanted rank is at the border of two values, and so anywhere between them in a sample."""
    generator = np.random.default_rng(5)
    border = np.where(generator.random(MANY) < 0.2, 1 / 8, 1 / 16)
    assert passes_over(tmp_path, monkeypatch, [border, generator.permutation(border)]) == 1


def test_differences_that_fill_a_wide_range_take_one_more_pass(tmp_path, monkeypatch):
    """fp32 numbers of all magnitudes: a bin of a wide window holds several of them."""
    generator = np.random.default_rng(6)
    deltas = [np.exp(generator.uniform(-60, 0, MANY)) for _ in range(2)]
    assert passes_over(tmp_path, monkeypatch, deltas, base=np.zeros(MANY)) == 2


def test_a_sample_that_misleads_costs_two_more_passes(tmp_path, monkeypatch):
    deltas = [misleading(np.random.default_rng(seed)) for seed in (0, 1)]
    assert passes_over(tmp_path, monkeypatch, deltas) == 3
