"""4-bit weights by bitsandbytes: NF4 with scales in 8 bits (QLoRA, 2305.14314, sections 2 and 3).

    W ~ code[q] a,     q: 4 bits an element, a: the largest magnitude of 64 elements in a row of memory
    a ~ code8[p] a2 + offset,      p: 8 bits, a2: fp32, one for 256 blocks
    bits an element: 4 + 8 / 64 + 32 / (64 * 256) = 4.127

Why bitsandbytes (0.50) and not torchao (0.18): it has kernels for NF4 on CUDA, ROCm, XPU and the CPU behind one
function; torchao's int4 has none for the CPU, its NF4 is configured from its prototypes, and peft 0.21 refuses its int4
tensors ("only supports int8 weights for now"). Only its functions are used, not its layers: `Linear4bit` repacks the
weights in place for bf16 when an AVX-512 CPU evaluates it, and trainers round the adapters of a model that holds such
layers to bf16, in which Adam's steps are lost.

The CPU kernel of 0.50.2 is wrong for rows that do not end with a block (0.2 of relative error and more in place of
0.09), so matrices are quantised as rows of one block; the blocks are the same.
"""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2.core.errors import UsageError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["BLOCK", "FourBitWeight", "require_bitsandbytes"]

BLOCK = 64  # elements that share a scale
LOGGER = "bitsandbytes"


def require_bitsandbytes() -> None:
    """Raise UsageError if bitsandbytes is not installed, or cannot be imported."""
    try:
        logging.getLogger(LOGGER).setLevel(logging.ERROR)  # it recommends further packages at every import
        import bitsandbytes  # noqa: F401
    except Exception as error:  # ImportError, or whatever its libraries raise
        cause = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        raise UsageError(f"--base-bits 4 needs bitsandbytes, which {cause}", "pip install 'gemma2[quant]'") from error


class FourBitWeight:
    """The quantised elements of a matrix. `packed`: uint8, two elements a byte, on the device of the scales."""

    def __init__(self, weight: Tensor) -> None:
        """Quantise a matrix (out, in) fp32 or bf16. Its dtype is that of `dequantised`."""
        from bitsandbytes.functional import quantize_4bit

        self.shape = weight.shape
        flat = weight.detach().reshape(-1)
        flat = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        packed, self.state = quantize_4bit(flat, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        self.packed: Tensor = packed

    def dequantised(self, packed: Tensor) -> Tensor:
        """Return the matrix (out, in). `packed`: the elements, wherever the layer keeps them."""
        from bitsandbytes.functional import dequantize_4bit

        flat: Tensor = dequantize_4bit(packed, self.state)
        return flat.reshape(-1)[: self.shape.numel()].view(self.shape)

    def product(self, x: Tensor, packed: Tensor) -> Tensor | None:
        """Return x (..., in) @ W.T without forming W; None where no kernel does. Records no gradient.

        bitsandbytes chooses the kernel by the number of rows; on a CPU it has no kernel for these blocks.
        """
        if x.device.type == "cpu" or self.shape[1] % BLOCK:
            return None
        from bitsandbytes.autograd._functions import matmul_4bit

        state = copy.copy(self.state)
        state.shape = self.shape
        result: Tensor = matmul_4bit(x, packed.t(), state)
        return result

    def __deepcopy__(self, memo: dict[int, object]) -> FourBitWeight:
        """Return the same object: it does not change, and a copy of a layer shares it."""
        return self

    def to(self, device: torch.device) -> None:
        """Move the scales; the layer moves the elements."""
        self.state.to(device)  # type: ignore[no-untyped-call]  # the library's own

    def scale_bytes(self) -> int:
        """Return the bytes of scales and tables."""
        state: QuantState = self.state
        tables = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        return sum(table.numel() * table.element_size() for table in tables)
