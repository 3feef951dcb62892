"""Number formats, and their conversion to fp32 and back: bf16, fp16, fp32. numba, without the GIL.

Widening is exact for every bit pattern. Narrowing rounds once, to nearest even, and reports whether a value is Inf
or NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload
from numpy.typing import NDArray

__all__ = ["ITEMS", "KINDS", "STORED", "Bytes", "Doubles", "Floats", "compiled", "narrow", "store", "value", "widen"]

KINDS = {"BF16": 0, "F16": 1, "F32": 2}  # the code of a format for the kernels
ITEMS = (2, 2, 4)  # bytes of an element, by kind
# Types that tell the compiler the format of an array, so that only the code for it is made.
STORED = {"BF16": np.uint16, "F16": np.int16, "F32": np.float32}
U1, U16, U7FFF = np.uint32(1), np.uint32(16), np.uint32(0x7FFF)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def compiled(inner: bool = False, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`njit` with the machine code kept on disk: next to the source, else in the user's cache directory.

    Where neither can be written the kernels still work, compiled again in each process. `inner` ones are called by
    other kernels only: they are compiled as part of these, without an entry for Python and without a separate file.
    """
    if inner:
        return njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(function, nogil=True, cache=True, **options)
        except RuntimeError:  # numba: "no locator available"
            return njit(function, nogil=True, **options)

    return decorate


@compiled(inner=True)
def float_bits(number: Any) -> Any:
    """The bit pattern of an fp32."""
    return np.float32(number).view(np.uint32)


@compiled(inner=True)
def bits_float(bits: Any) -> Any:
    """The fp32 of a bit pattern."""
    return np.uint32(bits).view(np.float32)


def value(stored: Any) -> Any:
    """An element as fp32: of a uint16 array it is bf16 bits, of a float32 array it is the number itself."""
    raise NotImplementedError("for compiled code")


@overload(value, inline="always", strict=False)
def _value(stored: Any) -> Any:
    from numba import types

    if stored == types.uint16:
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    return lambda stored: stored


@compiled(inner=True)
def half_to_float(half: Any) -> Any:
    """fp16 bits to fp32, exact."""
    magnitude = (half & 0x7FFF) << 13
    # The product moves the exponent bias from 15 to 127 and normalises subnormals on the way.
    widened = float_bits(bits_float(magnitude) * np.float32(2.0**112))
    if half & 0x7C00 == 0x7C00:  # Inf and NaN
        widened = np.uint32(magnitude | 0x7F800000)
    return bits_float(widened | ((half & 0x8000) << 16))


@compiled(inner=True)
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


@compiled()
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


@compiled(inner=True)
def to_bf16(values: Floats, halves: NDArray[np.uint16]) -> Any:
    """fp32 (n,) to bf16 bits (n,), to nearest even. False when a stored value is Inf or NaN."""
    # The largest magnitude as a bit pattern shows Inf and NaN; a separate loop, since with it in the rounding loop
    # the compiler uses half of the vector width.
    for i in range(values.size):
        bits = float_bits(values[i])
        odd = np.uint32(bits >> U16) & U1
        halves[i] = np.uint32(np.uint32(bits + U7FFF + odd) >> U16)
    return _largest(halves) < 0x7F80


@compiled(inner=True)
def to_fp16(values: Floats, halves: NDArray[np.uint16]) -> Any:
    """fp32 (n,) to fp16 bits (n,), to nearest even. False when a stored value is Inf or NaN."""
    for i in range(values.size):
        halves[i] = np.uint32(float_to_half(np.int64(float_bits(values[i]))))
    return _largest(halves) < 0x7C00


@compiled(inner=True)
def to_fp32(values: Floats, singles: Floats) -> Any:
    """fp32 (n,) as they are. False when a stored value is Inf or NaN."""
    largest = np.uint32(0)
    for i in range(values.size):
        largest = max(largest, float_bits(values[i]) & np.uint32(0x7FFFFFFF))
        singles[i] = values[i]
    return largest < 0x7F800000


@compiled()
def narrow(values: Floats, kind: int, raw: Bytes) -> Any:
    """fp32 (n,) to bytes (n * item) uint8, to nearest even. False when a stored value is Inf or NaN."""
    if kind == 0:
        return to_bf16(values, raw.view(np.uint16))
    if kind == 1:
        return to_fp16(values, raw.view(np.uint16))
    return to_fp32(values, raw.view(np.float32))


def store(values: Any, out: Any) -> Any:
    """`narrow` into an array whose dtype is that of the format in STORED."""
    raise NotImplementedError("for compiled code")


@overload(store, strict=False)
def _store(values: Any, out: Any) -> Any:
    from numba import types

    kernel = {types.uint16: to_bf16, types.int16: to_fp16}.get(out.dtype, to_fp32)
    return lambda values, out: kernel(values, out)


@compiled(inner=True)
def _largest(halves: NDArray[np.uint16]) -> Any:
    """The largest magnitude of 16-bit floats, as bits."""
    largest = np.uint16(0)
    for i in range(halves.size):
        magnitude = np.uint16(halves[i] & np.uint16(0x7FFF))
        largest = magnitude if magnitude > largest else largest
    return largest
