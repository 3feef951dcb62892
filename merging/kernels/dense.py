"""The arithmetic on tensors: Gram matrices of task vectors and fused linear combinations. numba, without the GIL.

Operands are rows of bf16 bits or of fp32; other formats were widened to fp32 before. Sums are fp32 inside a block of
4 Ki elements and fp64 across blocks, so that a norm over a vector of any length is right to 1e-6 (one fp32 sum over
the 590 M elements of the 2B embedding is 10 % low). Differences are taken before products. Out are rounded once,
to nearest even, on store.

Blocks are counted from the start of a tensor: results do not depend on the caller's cuts, as long as every cut is a
multiple of BLOCK.
"""

from __future__ import annotations

import numpy as np

from .dtypes import store, value
from .native import compiled
from .number_formats import Bytes, Doubles, Floats, Out, Stored

__all__ = ["BLOCK", "check_sum", "combine", "gram", "pair_count"]

BLOCK = 4096  # elements; operands and result of a block stay in the first and second level caches
REORDER = {"reassoc", "contract", "nsz"}  # sums may be vectorised; NaN and Inf keep their meaning
U1 = np.uint32(1)
CONTRACT = {"contract"}  # a * b + c may round once


@compiled(fastmath=REORDER)
def based_products(base: Stored, x: Stored, y: Stored) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Return |base|^2, <u, u>, <u, v>, <v, v> of u = x - base, v = y - base over one block, summed in fp32."""
    square, first, both, second = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(base.size):
        origin = value(base[i])
        u, v = value(x[i]) - origin, value(y[i]) - origin
        square += origin * origin
        first += u * u
        both += u * v
        second += v * v
    return square, first, both, second


@compiled(fastmath=REORDER)
def plain_products(x: Stored, y: Stored) -> tuple[np.float32, np.float32, np.float32]:
    """Return <x, x>, <x, y>, <y, y> over one block, summed in fp32."""
    first, both, second = np.float32(0), np.float32(0), np.float32(0)
    for i in range(x.size):
        u, v = value(x[i]), value(y[i])
        first += u * u
        both += u * v
        second += v * v
    return first, both, second


@compiled()
def precise_product(base: Stored, x: Stored, y: Stored, based: bool) -> tuple[float, float]:
    """Return |base|^2 and <u, v> in fp64, for blocks whose squares overflow fp32; finite if the operands are."""
    square, both = 0.0, 0.0
    for i in range(x.size):
        origin = np.float64(value(base[i])) if based else 0.0
        square += origin * origin
        both += (np.float64(value(x[i])) - origin) * (np.float64(value(y[i])) - origin)
    return square, both


@compiled()
def gram_block(stored: Stored, begin: int, end: int, based: bool, out: Doubles) -> None:
    """Inner products of columns [begin, end) into `out` (1 + pairs,), see `gram`."""
    start = 1 if based else 0
    vectors = len(stored) - start
    out[0] = 0.0
    for a in range(max(vectors - 1, 1)):
        for b in range(min(a + 1, vectors - 1), vectors):  # a single vector is its own partner
            x, y = stored[start + a, begin:end], stored[start + b, begin:end]
            if based:
                square, first, both, second = based_products(stored[0, begin:end], x, y)
                out[0] = square
            else:
                first, both, second = plain_products(x, y)
            # Row a of the upper triangle begins after the a rows above it.
            out[1 + a * vectors - a * (a - 1) // 2] = first
            out[1 + a * vectors - a * (a - 1) // 2 + b - a] = both
            out[1 + b * vectors - b * (b - 1) // 2] = second


@compiled()
def gram_block_precise(stored: Stored, begin: int, end: int, based: bool, out: Doubles) -> None:
    """`gram_block` in fp64."""
    start = 1 if based else 0
    column = 1
    for a in range(start, len(stored)):
        for b in range(a, len(stored)):
            x, y = stored[a, begin:end], stored[b, begin:end]
            out[0], out[column] = precise_product(stored[0, begin:end], x, y, based)
            column += 1


@compiled()
def not_finite(numbers: Doubles) -> bool:
    """Whether a number is Inf or NaN."""
    found = False
    for i in range(numbers.size):
        found |= not np.isfinite(numbers[i])
    return found


@compiled()
def gram(stored: Stored, count: int, based: bool, out: Doubles) -> None:
    """Inner products of the operands' vectors, per block.

    stored  (K, >= count) uint16 bits of bf16, or fp32; C-contiguous; row 0 is the base when `based`
    out     (ceil(count / BLOCK), 1 + pairs): |base|^2 (0 without base), then <v_i, v_j> for i <= j in row order, where
            v_i = operand_i - base, or the operand itself
    """
    for block in range(out.shape[0]):
        begin = block * BLOCK
        end = min(begin + BLOCK, count)
        gram_block(stored, begin, end, based, out[block])
        if not_finite(out[block]):
            gram_block_precise(stored, begin, end, based, out[block])


@compiled(fastmath=CONTRACT)
def add_one(total: Floats, x: Stored, around: Stored, weight: np.float32) -> None:
    """`total += weight * (x - around)`"""
    for i in range(total.size):
        total[i] += weight * (value(x[i]) - value(around[i]))


@compiled(fastmath=CONTRACT)
def add_two(total: Floats, x: Stored, y: Stored, around: Stored, weights: tuple[np.float32, np.float32]) -> None:
    """`total += weights[0] * (x - around) + weights[1] * (y - around)`"""
    first, second = weights
    for i in range(total.size):
        middle = value(around[i])
        total[i] += first * (value(x[i]) - middle) + second * (value(y[i]) - middle)


@compiled(fastmath=CONTRACT)
def add_scaled(total: Floats, around: Stored, scale: np.float32) -> None:
    """`total = scale * around + total`; a total of 0 is not added, since -0.0 + 0.0 loses the sign."""
    for i in range(total.size):
        scaled = scale * value(around[i])
        total[i] = scaled + total[i] if total[i] != np.float32(0) else scaled


@compiled(fastmath=CONTRACT)
def blend_two(
    x: Stored, y: Stored, around: Stored, weights: tuple[np.float32, np.float32, np.float32], total: Floats
) -> None:
    """`total = scale * around + first * (x - around) + second * (y - around)` in one loop.

    weights  first, second, scale
    """
    first, second, scale = weights
    for i in range(total.size):
        middle = value(around[i])
        change = first * (value(x[i]) - middle) + second * (value(y[i]) - middle)
        scaled = scale * middle
        total[i] = scaled + change if change != np.float32(0) else scaled


@compiled()
def combine_block(stored: Stored, begin: int, weights: Doubles, total: Floats) -> None:
    """One output of one block: the sum of weighted rows, taken around the row of the largest weight."""
    end = begin + total.size
    pivot, whole, terms, last = 0, 0.0, 0, 0
    for k in range(weights.size):
        whole += weights[k]
        if abs(weights[k]) > abs(weights[pivot]):
            pivot = k
    for k in range(weights.size):
        if k != pivot and weights[k] != 0:
            terms, last = terms + 1, k
    around = stored[pivot, begin:end]
    # Weights that were computed as 1 - sum of the others miss 1 by an fp64 rounding.
    scale = np.float32(1.0) if abs(whole - 1.0) < 1e-12 else np.float32(whole)
    if terms <= 2:
        first = pivot  # of fewer terms the others are 0 * (around - around)
        for k in range(last):
            if k != pivot and weights[k] != 0:
                first = k
        if terms == 0:
            last = pivot
        one = np.float32(weights[first]) if first != pivot else np.float32(0)
        two = np.float32(weights[last]) if last != pivot else np.float32(0)
        blend_two(stored[first, begin:end], stored[last, begin:end], around, (one, two, scale), total)
        return
    previous = -1  # terms are added in pairs, which halves the loads and stores of the total
    for i in range(total.size):
        total[i] = np.float32(0)
    for k in range(weights.size):
        if k != pivot and weights[k] != 0:
            if previous < 0:
                previous = k
                continue
            pair = np.float32(weights[previous]), np.float32(weights[k])
            add_two(total, stored[previous, begin:end], stored[k, begin:end], around, pair)
            previous = -1
    if previous >= 0:
        add_one(total, stored[previous, begin:end], around, np.float32(weights[previous]))
    add_scaled(total, around, scale)


@compiled()
def combine(stored: Stored, count: int, weights: Doubles, total: Floats, out: Out) -> bool:
    """`out[e] = sum_k weights[e, k] * operand_k` for every output e. False if a stored value is Inf or NaN.

    stored   (K, >= count) uint16 bits of bf16, or fp32; C-contiguous
    weights  (E, K) fp64
    total    (BLOCK,) fp32 work space
    out      (E, >= count) of a dtype in STORED: bits of bf16, bits of fp16, or fp32

    Computed as `s * r + sum_k w_k * (operand_k - r)` around the operand r of the largest weight, s = sum of weights:
    the small terms are summed first, equal operands give the same values, and a single weight of 1 gives that operand
    bit for bit.
    """
    finite = True
    for begin in range(0, count, BLOCK):
        end = min(begin + BLOCK, count)
        for e in range(weights.shape[0]):
            combine_block(stored, begin, weights[e], total[: end - begin])
            finite &= store(total[: end - begin], out[e, begin:end])
    return finite


@compiled()
def check_edge(data: Bytes, place: int) -> np.uint64:
    """`check_sum` byte by byte, for the ends of a piece that do not fill a word."""
    total = np.uint64(0)
    for i in range(data.size):
        shift = np.uint64(8 * ((place + i) % 8))
        factor = np.uint64(2 * ((place + i) // 8) + 1)
        total += (np.uint64(data[i]) << shift) * factor
    return total


@compiled()
def check_sum(data: Bytes, place: int) -> np.uint64:
    """Return `sum_i word_i * (2 i + 1)` modulo 2**64 over 64-bit words, i counted from the start of the file.

    place  offset of the first byte in the file

    Sums of pieces add up to the sum of the whole, for any cuts and in any order. Odd factors have inverses, so every
    change of a single word changes the sum, and a word in the wrong place counts differently. It detects errors of the
    writer and the disk, not forgery: files also have a cryptographic digest.
    """
    head = min(-place % 8, data.size)
    whole = (data.size - head) // 8 * 8
    total = check_edge(data[:head], place) + check_edge(data[head + whole :], place + head + whole)
    words = data[head : head + whole].view(np.uint64)
    first = np.uint64(2 * ((place + head) // 8) + 1)
    for i in range(words.size):
        total += words[i] * (first + np.uint64(2) * np.uint64(i))
    return total


def pair_count(vectors: int) -> int:
    """Return the number of products <v_i, v_j> with i <= j."""
    return vectors * (vectors + 1) // 2
