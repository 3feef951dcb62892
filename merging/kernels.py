"""The arithmetic on tensors: Gram matrices of task vectors and fused linear combinations. numba, without the GIL.

Raw bytes of bf16, fp16 or fp32 come in, one row per operand, and are widened to fp32 in blocks of 4 Ki elements.
Sums run in fp32 inside a block and leave it as fp64, so that a norm over a vector of any length is right to 1e-6 (one
fp32 sum over the 590 M elements of the 2B embedding is 10 % low). Differences are taken before products. Results are
rounded once, to nearest even, on store.

Blocks are counted from the start of a tensor: results do not depend on how the caller cuts it, as long as every cut
is a multiple of BLOCK.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.core import event
from numpy.typing import NDArray

__all__ = ["BLOCK", "KINDS", "combine", "gram", "pair_count", "prepare"]

BLOCK = 4096  # elements; three operands and the result stay in the first and second level caches
KINDS = {"BF16": 0, "F16": 1, "F32": 2}  # how the kernels are told what the bytes are
REORDER = {"reassoc", "contract", "nsz"}  # sums may be vectorised; NaN and Inf keep their meaning
U1, U16, U7FFF = np.uint32(1), np.uint32(16), np.uint32(0x7FFF)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`njit` with the machine code kept on disk: beside the source, else in the user's cache directory.

    Where neither can be written the kernels still work, compiled again in each process.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(function, nogil=True, cache=True, **options)
        except RuntimeError:  # numba: "no locator available"
            return njit(function, nogil=True, **options)

    return decorate


@_compiled()
def float_bits(value: Any) -> Any:
    """The bit pattern of an fp32."""
    return np.float32(value).view(np.uint32)


@_compiled()
def bits_float(bits: Any) -> Any:
    """The fp32 of a bit pattern."""
    return np.uint32(bits).view(np.float32)


@_compiled()
def half_to_float(half: Any) -> Any:
    """fp16 bits to fp32, exact."""
    magnitude = (half & 0x7FFF) << 13
    # The product moves the exponent bias from 15 to 127 and normalises subnormals on the way.
    widened = float_bits(bits_float(magnitude) * np.float32(2.0**112))
    if half & 0x7C00 == 0x7C00:  # Inf and NaN
        widened = np.uint32(magnitude | 0x7F800000)
    return bits_float(widened | ((half & 0x8000) << 16))


@_compiled()
def float_to_half(bits: Any) -> Any:
    """fp32 bits to fp16 bits, to nearest even."""
    magnitude = bits & 0x7FFFFFFF
    if magnitude >= 0x477FF000:  # 65520 and above round to Inf
        half: Any = 0x7C00
    elif magnitude < 0x38800000:  # below 2**-14: 0.5 has the spacing of fp16 subnormals
        half = np.int64(float_bits(bits_float(magnitude) + np.float32(0.5))) - 0x3F000000
    else:  # exponent bias from 127 to 15, then 13 bits rounded away
        half = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    return half | ((bits >> 16) & 0x8000)


@_compiled()
def widen(raw: Bytes, kind: int, out: Floats) -> None:
    """Bytes of one operand, (n * item) uint8, to fp32 (n,). Exact for every bit pattern."""
    if kind == 0:
        halves = raw.view(np.uint16)
        for i in range(out.size):
            out[i] = bits_float(np.uint32(halves[i]) << 16)
    elif kind == 1:
        halves = raw.view(np.uint16)
        for i in range(out.size):
            out[i] = half_to_float(np.int64(halves[i]))
    else:
        singles = raw.view(np.float32)
        for i in range(out.size):
            out[i] = singles[i]


@_compiled()
def narrow(values: Floats, kind: int, raw: Bytes) -> Any:
    """fp32 (n,) to bytes (n * item) uint8, to nearest even. False when a stored value is Inf or NaN."""
    # The largest magnitude as a bit pattern tells Inf and NaN without a branch in the loop.
    largest = np.uint32(0)
    if kind == 0:
        halves = raw.view(np.uint16)
        for i in range(values.size):
            bits = float_bits(values[i])
            odd = np.uint32(bits >> U16) & U1
            half = np.uint32(np.uint32(bits + U7FFF + odd) >> U16)
            largest = max(largest, np.uint32(half & U7FFF))
            halves[i] = half
        return largest < 0x7F80
    if kind == 1:
        halves = raw.view(np.uint16)
        for i in range(values.size):
            half = np.uint32(float_to_half(np.int64(float_bits(values[i]))))
            largest = max(largest, half & np.uint32(0x7FFF))
            halves[i] = half
        return largest < 0x7C00
    singles = raw.view(np.float32)
    for i in range(values.size):
        largest = max(largest, float_bits(values[i]) & np.uint32(0x7FFFFFFF))
        singles[i] = values[i]
    return largest < 0x7F800000


@_compiled(fastmath=REORDER)
def dot(x: Floats, y: Floats) -> float:
    """Inner product of two blocks (n <= BLOCK): fp32, or fp64 where fp32 overflows. Not finite only if x or y is."""
    total = np.float32(0)
    for i in range(x.size):
        total += x[i] * y[i]
    if np.isfinite(total):
        return np.float64(total)
    precise = np.float64(0)
    for i in range(x.size):
        precise += np.float64(x[i]) * np.float64(y[i])
    return precise


@_compiled()
def gram(raw: Bytes, kinds: NDArray[np.int64], count: int, based: bool, rows: Floats, out: Doubles) -> None:
    """Inner products of the operands' vectors, per block.

    raw    (K, >= count * item) uint8, one operand per row; row 0 is the base when `based`
    kinds  (K,) how each row is encoded
    rows   (K, BLOCK) fp32 work space
    out    (ceil(count / BLOCK), 1 + pairs): |base|^2 (0 without base), then <v_i, v_j> for i <= j in row order, where
           v_i = operand_i - base, or the operand itself
    """
    first = 1 if based else 0
    for block in range(out.shape[0]):
        start = block * BLOCK
        size = min(BLOCK, count - start)
        for k in range(kinds.size):
            item = 4 if kinds[k] == 2 else 2
            widen(raw[k, start * item : (start + size) * item], kinds[k], rows[k, :size])
        out[block, 0] = 0.0
        if based:
            base = rows[0, :size]
            out[block, 0] = dot(base, base)
            for k in range(1, kinds.size):
                vector = rows[k, :size]
                for i in range(size):
                    vector[i] -= base[i]
        column = 1
        for a in range(first, kinds.size):
            for b in range(a, kinds.size):
                out[block, column] = dot(rows[a, :size], rows[b, :size])
                column += 1


@_compiled()
def combine(
    raw: Bytes, kinds: NDArray[np.int64], count: int, weights: Doubles, rows: Floats, out: Bytes, out_kind: int
) -> bool:
    """`out[e] = sum_k weights[e, k] * operand_k` for every output e. False when a stored value is Inf or NaN.

    raw      (K, >= count * item) uint8, one operand per row, encoded as `kinds` (K,) says
    weights  (E, K) fp64
    rows     (K + 1, BLOCK) fp32 work space
    out      (E, >= count * item) uint8, encoded as `out_kind`

    Formed as `s * r + sum_k w_k * (operand_k - r)` around the operand r of the largest weight, s = sum of weights:
    the small terms are summed first, equal operands give themselves, and a single weight of 1 gives that operand bit
    for bit.
    """
    finite = True
    operands = kinds.size
    out_item = 4 if out_kind == 2 else 2
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        for k in range(operands):
            item = 4 if kinds[k] == 2 else 2
            widen(raw[k, start * item : (start + size) * item], kinds[k], rows[k, :size])
        total = rows[operands, :size]
        for e in range(weights.shape[0]):
            pivot = np.argmax(np.abs(weights[e]))
            around = rows[pivot, :size]
            scale = weights[e].sum()
            # Weights that were formed as 1 - sum of the others miss 1 by an fp64 rounding.
            scale = np.float32(1.0) if abs(scale - 1.0) < 1e-12 else np.float32(scale)
            for i in range(size):
                total[i] = np.float32(0)
            for k in range(operands):
                weight = np.float32(weights[e, k])
                if k != pivot and weight != 0:
                    row = rows[k, :size]
                    for i in range(size):
                        total[i] += weight * (row[i] - around[i])
            for i in range(size):
                scaled = scale * around[i]
                total[i] = scaled + total[i] if total[i] != 0 else scaled  # -0.0 + 0.0 would lose the sign
            finite &= narrow(total, out_kind, out[e, start * out_item : (start + size) * out_item])
    return finite


def pair_count(vectors: int) -> int:
    """Columns of <v_i, v_j>, i <= j."""
    return vectors * (vectors + 1) // 2


class _Announcer(event.Listener):
    """Tells the user once that machine code is being made; numba fires the event only when the disk has none."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note: Callable[[str], None] | None = note

    def on_start(self, event: Any) -> None:
        if self.note:
            self.note("compiling the merge kernels (once per machine, a few seconds)")
            self.note = None

    def on_end(self, event: Any) -> None:
        return None


def prepare(note: Callable[[str], None]) -> None:
    """Load the kernels from the disk cache, or compile them and say so in one line."""
    signatures = (
        (gram, "void(uint8[:,::1], int64[::1], int64, boolean, float32[:,::1], float64[:,::1])"),
        (combine, "boolean(uint8[:,::1], int64[::1], int64, float64[:,::1], float32[:,::1], uint8[:,::1], int64)"),
    )
    with event.install_listener("numba:compile", _Announcer(note)):
        for kernel, signature in signatures:
            kernel.compile(signature)
