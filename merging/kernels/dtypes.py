"""Stored formats bf16, fp16 and fp32: their conversion to fp32 and back.

Widening is exact for every bit pattern. Narrowing rounds once, to nearest even, and returns whether all stored values
are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .native import compiled, form_of, in_kernels
from .number_formats import Bytes, Floats, Out

__all__ = ["narrow", "store", "to_bf16", "to_fp16", "to_fp32", "value", "widen"]


class HasDtype(Protocol):
    """numba's type of an array."""

    dtype: object


U1, U16, U7FFF = np.uint32(1), np.uint32(16), np.uint32(0x7FFF)


@compiled()
def float_bits(number: np.float32) -> np.uint32:
    """Return the bit pattern of an fp32."""
    return np.float32(number).view(np.uint32)


@compiled()
def bits_float(bits: np.uint32 | np.int64) -> np.float32:
    """Return the fp32 with a bit pattern."""
    return np.uint32(bits).view(np.float32)


def value(stored: np.uint16 | np.float32) -> np.float32:
    """Return an element as fp32: a uint16 is the bits of a bf16, a float32 is the number itself."""
    raise NotImplementedError("for compiled code")


@form_of(value, inline="always")
def _value(stored: object) -> Callable[..., object]:
    if str(stored) == "uint16":
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    return lambda stored: stored


@compiled()
def half_to_float(half: np.int64) -> np.float32:
    """Convert fp16 bits to fp32, exactly."""
    magnitude = (half & 0x7FFF) << 13
    # The product moves the exponent bias from 15 to 127 and normalises subnormals on the way.
    widened = float_bits(bits_float(magnitude) * np.float32(2.0**112))
    if half & 0x7C00 == 0x7C00:  # Inf and NaN
        widened = np.uint32(magnitude | 0x7F800000)
    return bits_float(widened | ((half & 0x8000) << 16))


@compiled()
def float_to_half(bits: np.int64) -> np.int64:
    """Convert fp32 bits to fp16 bits, to nearest even."""
    magnitude = bits & 0x7FFFFFFF
    if magnitude >= 0x477FF000:  # 65520 and above round to Inf
        half: int | np.int64 = 0x7C00
    elif magnitude < 0x38800000:  # below 2**-14: 0.5 has the spacing of fp16 subnormals
        half = np.int64(float_bits(bits_float(magnitude) + np.float32(0.5))) - 0x3F000000
    else:  # exponent bias from 127 to 15, then 13 bits rounded away
        half = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    return half | ((bits >> 16) & 0x8000)


@compiled()
def widen(raw: Bytes, kind: int, out: Floats) -> None:
    """Convert bytes of one operand, (n * item) uint8, to fp32 (n,). Exact for every bit pattern."""
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


@compiled()
def to_bf16(values: Floats, halves: NDArray[np.uint16]) -> np.bool_:
    """Convert fp32 (n,) to bf16 bits (n,), to nearest even. False if a stored value is Inf or NaN."""
    # The bit pattern of the largest magnitude reveals Inf and NaN. It has a separate loop: inside the rounding loop it
    # would make the compiler use half of the vector width.
    for i in range(values.size):
        bits = float_bits(values[i])
        odd = np.uint32(bits >> U16) & U1
        halves[i] = np.uint32(np.uint32(bits + U7FFF + odd) >> U16)
    return _largest(halves) < 0x7F80


@compiled()
def to_fp16(values: Floats, halves: NDArray[np.uint16]) -> np.bool_:
    """Convert fp32 (n,) to fp16 bits (n,), to nearest even. False if a stored value is Inf or NaN."""
    for i in range(values.size):
        halves[i] = np.uint32(float_to_half(np.int64(float_bits(values[i]))))
    return _largest(halves) < 0x7C00


@compiled()
def to_fp32(values: Floats, singles: Floats) -> np.bool_:
    """Copy fp32 (n,). False if a stored value is Inf or NaN."""
    largest = np.uint32(0)
    for i in range(values.size):
        largest = max(largest, float_bits(values[i]) & np.uint32(0x7FFFFFFF))
        singles[i] = values[i]
    return largest < 0x7F800000


@compiled()
def narrow(values: Floats, kind: int, raw: Bytes) -> np.bool_:
    """Convert fp32 (n,) to bytes (n * item) uint8, to nearest even. False if a stored value is Inf or NaN."""
    if kind == 0:
        return to_bf16(values, raw.view(np.uint16))
    if kind == 1:
        return to_fp16(values, raw.view(np.uint16))
    return to_fp32(values, raw.view(np.float32))


def store(values: Floats, out: Out) -> bool:
    """`narrow` into an array whose dtype gives the format, by STORED."""
    raise NotImplementedError("for compiled code")


@form_of(store)
def _store(values: object, out: HasDtype) -> Callable[..., object]:
    kernels: dict[str, object] = {"uint16": to_bf16, "int16": to_fp16}
    kernel = in_kernels(kernels.get(str(out.dtype), to_fp32))
    return lambda values, out: kernel(values, out)


@compiled()
def _largest(halves: NDArray[np.uint16]) -> np.uint16:
    """Return the bits of the largest magnitude among 16-bit floats."""
    largest = np.uint16(0)
    for i in range(halves.size):
        magnitude = np.uint16(halves[i] & np.uint16(0x7FFF))
        largest = magnitude if magnitude > largest else largest
    return largest
