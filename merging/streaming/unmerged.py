"""Tensors that the output takes from the first model as they are: read, converted if a dtype is requested, written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, printable
from gemma2.merging.inputs.checkpoint import Reader
from gemma2.merging.kernels.dense import check_sum
from gemma2.merging.kernels.dtypes import narrow, widen
from gemma2.merging.kernels.number_formats import KINDS
from gemma2.merging.plan.merge_plan import MergePlan

from .dense_stream import Output
from .writer import aligned

__all__ = ["carry"]

PIECE = 1 << 20  # elements; a multiple of the pages that writes past the page cache need


def carry(plan: MergePlan, reader: Reader, output: Output) -> Iterator[str]:
    """Write each carried tensor to every output, and yield its name. Raises InputError for NaN, Inf or an overflow."""
    model = plan.models[0]
    for name in plan.carried:
        tensor, dtype = model.tensors[name], plan.layout[name][0]
        size = min(PIECE, tensor.count)
        raw, values = np.empty(size * ITEM_BYTES[tensor.dtype], np.uint8), np.empty(size, np.float32)
        out = aligned((size * ITEM_BYTES[dtype],))
        for first in range(0, tensor.count, PIECE):
            count = min(PIECE, tensor.count - first)
            stored, written = raw[: count * ITEM_BYTES[tensor.dtype]], out[: count * ITEM_BYTES[dtype]]
            reader.read(tensor, first, count, stored)
            widen(stored, KINDS[tensor.dtype], values[:count])
            if not np.isfinite(values[:count]).all():
                raise InputError(f"{model}: {printable(name)} holds NaN or Inf", "give an earlier checkpoint")
            if not narrow(values[:count], KINDS[dtype], written):
                raise InputError(f"{printable(name)} overflows {dtype}", "give --dtype float32")
            begin = first * ITEM_BYTES[dtype]
            for writer in output.writers:
                writer.write(name, begin, written)
            places = [writer.places[name].offset + begin for writer in output.writers]
            output.checks.add(name, [int(check_sum(written, place)) for place in places])
        yield name
