"""The largest elements of a task vector: exact thresholds by counting, without sorting.

Magnitudes of fp32 numbers order like their bit patterns. A sample estimates the pattern of the wanted rank, and a range
that is likely to hold it. One pass over the data counts the elements above that range, and in each of its WINDOW bins.
A bin is one pattern, or 2**shift of them where the range is wide: that is so for differences of bf16 numbers, which are
few and far apart, and then the lowest `shift` bits of all patterns in a bin are 0, so that it still is one pattern. If
not, another pass counts the patterns of the bin that holds the rank. If the rank is outside the range, one more pass
counts all patterns in steps of 2**COARSE: the sample affects the time, never the result. Counts are integers: they add
up over cuts, tensors and threads in any order.

k = max(1, floor(density * n)); elements equal to the k-th largest are all kept, whatever their order, so that more than
k may stay. The papers do not state their rounding, and their sorts keep k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .dense import BLOCK
from .dtypes import float_bits, value
from .file_passes import DONE, Longs, load
from .native import compiled
from .number_formats import Bytes, Stored

__all__ = [
    "BINS",
    "COARSE",
    "MIXED",
    "PIECE",
    "WINDOW",
    "Window",
    "count_near",
    "counting_space",
    "kept_ranks",
    "magnitude",
    "near_rank",
    "place_of_rank",
    "sample",
    "sample_places",
    "window_near",
]

WINDOW = 1 << 18  # bit patterns: at least 3 % between the smallest and the largest magnitude of a window
BINS = WINDOW + 8  # the last eight count the elements outside: increments of a single one would wait for each other
MIXED = 1 << 40  # in the count of a bin: it holds several patterns; no tensor has so many elements
LIKELY = 6.0  # standard errors of a rank in the sample, on either side
COARSE = 13  # WINDOW steps of 2**COARSE patterns cover all patterns
PIECE = 512  # neighbouring elements in each piece of a sample
MAGNITUDE = np.uint32(0x7FFFFFFF)

Counts = NDArray[np.int64]
Window = tuple[int, int]  # first pattern, and binary logarithm of the patterns in a bin (shift)
Bits = NDArray[np.uint32]


def kept_ranks(count: int, density: float, gamma: float = 0.0) -> tuple[int, int]:
    """Return the first and last rank (1 is the largest magnitude) that are kept of `count` elements.

    The largest floor(gamma * count) are dropped, the next k = max(1, floor(density * count)) kept; gamma is at most
    1 - density.
    """
    kept = min(max(1, int(density * count + 1e-6)), count)  # 0.29 * 100 is 28.999999999999996
    dropped = min(int(min(gamma, 1.0 - density) * count + 1e-6), count - kept)
    return dropped + 1, dropped + kept


def magnitude(bits: int) -> float:
    """Return the fp32 number with these bits."""
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def sample_places(count: int, wanted: int) -> Longs:
    """Return the first elements of evenly spread pieces, which together hold `wanted` of `count` elements or more."""
    pieces = -(-wanted // PIECE)
    if pieces * PIECE >= count:
        return np.arange(0, count, PIECE)
    return np.arange(pieces) * count // pieces


def near_rank(bits: Bits, rank: int, count: int) -> int:
    """Estimate the pattern of the rank-th largest of `count` elements from a sample; exact if the sample holds all."""
    place = _place_in_sample(len(bits), rank, count)
    return int(np.partition(bits, len(bits) - place)[len(bits) - place])


def window_near(bits: Bits, rank: int, count: int) -> Window:
    """Return a window that is likely to hold the rank-th largest of `count` elements, by a sample."""
    place, share = _place_in_sample(len(bits), rank, count), rank / count
    spread = int(LIKELY * np.sqrt(len(bits) * share * max(1 - share, 0))) + 1
    low, high = len(bits) - min(place + spread, len(bits)), len(bits) - max(place - spread, 1)
    part = np.partition(bits, [low, high])
    first, last = int(part[low]), int(part[high])
    shift = max((last - first).bit_length() - (WINDOW // 2).bit_length() + 1, 0)
    middle = (first + last) // 2 - (WINDOW << shift) // 2
    return max(middle, 0) >> shift << shift, shift


def _place_in_sample(size: int, rank: int, count: int) -> int:
    return min(max(round((rank - 0.5) / count * size + 0.5), 1), size)


def place_of_rank(counts: Counts, above: int, rank: int) -> int | None:
    """Return the bin of the rank-th largest element, with `above` elements beyond the last bin; None if in no bin."""
    cumulated = np.cumsum(counts[::-1])
    if not above < rank <= above + cumulated[-1]:
        return None
    return len(counts) - 1 - int(np.searchsorted(cumulated, rank - above))


@compiled()
def delta_bits(x: Stored, base: Stored, out: Bits) -> None:
    """Bit patterns of |x - base|."""
    for i in range(out.size):
        out[i] = np.uint32(float_bits(value(x[i]) - value(base[i])) & MAGNITUDE)


@compiled()
def sample(files: Longs, places: Longs, count: int, stored: Stored, out: Bits) -> int:
    """Bit patterns of all deltas in pieces of a tensor. Returns a code of `file_passes`.

    files   see `file_passes.load`
    places  (P,) first elements of pieces of PIECE elements, or fewer at the end of the tensor's `count` elements
    stored  (M + 1, >= PIECE) work space, row 0 the base
    out     (M, >= P * PIECE) filled piece by piece without gaps
    """
    done = 0
    for place in places:
        size = min(PIECE, count - place)
        failed = load(files, place, size, stored)
        if failed:
            return failed
        for m in range(len(out)):
            delta_bits(stored[m + 1, :size], stored[0, :size], out[m, done : done + size])
        done += size
    return DONE


@compiled()
def offsets_of(bits: Bits, low: np.uint32, shift: np.uint32, offsets: Bits, inside: Bytes) -> np.int64:
    """The bin of each pattern in a window that begins at `low`, and whether it is inside; returns the number above."""
    above = np.uint32(0)
    high = np.uint32(low + np.uint32(np.uint32(WINDOW) << shift))
    for i in range(bits.size):
        above = np.uint32(above + np.uint32(bits[i] >= high))
        offset = np.uint32(np.uint32(bits[i] - low) >> shift)
        hit = offset < np.uint32(WINDOW)
        offsets[i] = offset if hit else np.uint32(np.uint32(WINDOW) + np.uint32(np.uint32(i) & np.uint32(7)))
        inside[i] = hit
    return np.int64(above)


@compiled()
def count_inside(bits: Bits, shift: np.uint32, offsets: Bits, inside: NDArray[np.uint64], counts: Counts) -> None:
    """Count the elements inside; they are few, so `inside` is tested eight at a time: (n / 8,) uint64.

    A bin that holds a pattern other than its first is marked: MIXED is added once.
    """
    mask = np.uint32(np.uint32(np.uint32(1) << shift) - np.uint32(1))
    for word in range(inside.size):
        if inside[word]:
            for i in range(8 * word, 8 * word + 8):
                counts[offsets[i]] += 1
                if bits[i] & mask and counts[offsets[i]] < MIXED:
                    counts[offsets[i]] += MIXED


def counting_space() -> tuple[Bits, Bits, Bytes]:
    """Return work space for one call of `count_near`."""
    return np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32), np.zeros(BLOCK, np.uint8)


@compiled()
def count_near(stored: Stored, count: int, windows: Longs, counts: Counts, work: tuple[Bits, Bits, Bytes]) -> None:
    """Count magnitudes of deltas.

    stored   (M + 1, >= count), row 0 the base
    windows  (Q, 3): row of a model (1..M), first pattern (a multiple of 2**shift), and shift
    counts   (Q, 1 + BINS) to which the numbers of elements above the window and in each of its bins are added
    work     from `counting_space`
    """
    bits, offsets, inside = work
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        words = (size + 7) // 8
        for i in range(size, 8 * words):
            offsets[i], inside[i] = np.uint32(WINDOW), np.uint8(0)
        for q in range(len(windows)):
            low, shift = np.uint32(windows[q, 1]), np.uint32(windows[q, 2])
            if q == 0 or windows[q, 0] != windows[q - 1, 0]:
                delta_bits(stored[windows[q, 0], start : start + size], stored[0, start : start + size], bits[:size])
            counts[q, 0] += offsets_of(bits[:size], low, shift, offsets, inside)
            count_inside(bits, shift, offsets, inside[: 8 * words].view(np.uint64), counts[q, 1:])
