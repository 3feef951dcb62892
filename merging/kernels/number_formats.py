"""Stored formats bf16, fp16 and fp32: their numbers in kernels, and the arrays that hold them. Without numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ITEMS", "KINDS", "STORED", "Bytes", "Doubles", "Floats", "Out", "Stored"]

KINDS = {"BF16": 0, "F16": 1, "F32": 2}  # the number by which kernels know the format of raw bytes
ITEMS = (2, 2, 4)  # bytes per element, by kind
# The dtype of an array tells numba the format of its numbers, so that only the code for that format is compiled.
STORED = {"BF16": np.uint16, "F16": np.int16, "F32": np.float32}

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Stored = NDArray[np.uint16] | NDArray[np.float32]  # operands: bits of bf16, or fp32
Out = NDArray[np.uint16] | NDArray[np.int16] | NDArray[np.float32]  # see STORED
