"""The values of the weights, streamed: NaN, infinity, tensors of zeros or of one value."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from gemma2.core.outputs.safetensors_header import ITEM_BYTES, Tensor, printable

from .finding import Diagnosis, fine, problem, warning
from .subject import ADAPTER, Subject

__all__ = ["Pass", "check_values", "values_of"]

PIECE = 1 << 22  # bytes that are read at once
BLOCK = 1 << 17  # elements that are looked at at once: they stay in the cache of a core
# dtype -> unsigned type of its bits, and the bits of its exponent: all set in infinities and NaN, and in nothing else.
BITS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
}


class Pass:
    """What a pass over one tensor found.

    bad       index of the first element that is not finite, or -1
    constant  whether all elements have the same bits
    zero      whether all are 0 or -0
    """

    def __init__(self, bad: int, constant: bool, zero: bool) -> None:
        self.bad, self.constant, self.zero = bad, constant, zero


def values_of(tensor: Tensor) -> Pass:
    """Read one floating-point tensor from its file. Stops at the first element that is not finite."""
    kind, exponent = BITS[tensor.dtype]
    mask = np.full(1, (1 << (8 * ITEM_BYTES[tensor.dtype] - 1)) - 1, kind)
    scratch: NDArray[np.unsignedinteger] = np.empty(BLOCK, kind)
    first: int | None = None
    constant = zero = True
    done = 0
    for piece in _pieces(tensor):
        bits: NDArray[np.unsignedinteger] = piece.view(kind)
        for start in range(0, len(bits), BLOCK):
            block = bits[start : start + BLOCK]
            part = np.bitwise_and(block, mask, out=scratch[: len(block)])
            largest = int(part.max())
            if largest >= exponent:
                return Pass(done + start + int(np.argmax(part >= exponent)), False, False)
            zero = zero and largest == 0
            if constant:
                first = int(block[0]) if first is None else first
                constant = bool((block == first).all())
        done += len(bits)
    return Pass(-1, constant and tensor.count > 1, zero and tensor.count > 0)


def _pieces(tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor in pieces of whole elements; the next is read while the caller looks at one."""
    sizes = [min(PIECE, tensor.nbytes - start) for start in range(0, tensor.nbytes, PIECE)]
    buffers = [np.empty(min(PIECE, max(tensor.nbytes, 1)), np.uint8) for _ in range(2)]
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.offset)

        def read(number: int) -> NDArray[np.uint8]:
            piece = buffers[number % 2][: sizes[number]]
            filled = 0
            while filled < len(piece):
                got = file.readinto(memoryview(piece[filled:]))  # type: ignore[arg-type]
                if not got:
                    raise OSError(f"{tensor.file} ended while {tensor.name} was read")
                filled += got
            return piece

        if len(sizes) < 2:
            yield from (read(number) for number in range(len(sizes)))
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read, 0)
            for number in range(len(sizes)):
                piece = ahead.result()
                if number + 1 < len(sizes):
                    ahead = reader.submit(read, number + 1)
                yield piece


def check_values(subject: Subject) -> Iterator[Diagnosis]:
    zeros: list[str] = []
    constant: list[str] = []
    for tensor in sorted(subject.tensors.values(), key=lambda one: (one.file, one.offset)):
        if tensor.dtype not in BITS:
            continue
        found = values_of(tensor)
        if found.bad >= 0:
            place = [int(index) for index in np.unravel_index(found.bad, tensor.shape)] if tensor.shape else []
            yield problem(
                f"{printable(tensor.name)} holds NaN or infinity, first at {place}",
                "use the checkpoint before it: its training diverged, or its file is damaged",
            )
            return
        if found.zero and not _may_be_zero(subject, tensor):
            zeros.append(tensor.name)
        elif found.constant and not _is_norm(tensor):
            constant.append(tensor.name)
    if zeros:
        fix = "fetch or save the weights again"
        many = len(zeros) == len(subject.tensors)
        yield problem(f"{len(zeros)} tensors hold zeros only: {'all' if many else printable(zeros[0])}", fix)
    if constant:
        yield warning(f"{len(constant)} tensors hold one value: {printable(constant[0])}", "check how they were made")
    if not zeros and not constant and subject.tensors:
        yield fine(f"{sum(tensor.count for tensor in subject.tensors.values()):,} numbers, all finite")


def _is_norm(tensor: Tensor) -> bool:
    return "norm" in tensor.name


def _may_be_zero(subject: Subject, tensor: Tensor) -> bool:
    """Zeros that are usual: a norm's offset from 1 and a bias before training, LoRA's B. A head says it elsewhere."""
    untrained = subject.kind == ADAPTER and "lora_B" in tensor.name
    return _is_norm(tensor) or tensor.name.endswith(".bias") or untrained or tensor.name == "score.weight"
