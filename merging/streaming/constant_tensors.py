"""Tensors that hold one value only: the mark of a broken save, since training leaves no matrix constant.

The first elements of each tensor are read; the rest only if those are equal.
"""

from __future__ import annotations

import numpy as np

from gemma2.core.outputs.safetensors_header import ITEM_BYTES, Tensor, printable
from gemma2.merging.inputs.checkpoint import Checkpoint, Reader
from gemma2.merging.kernels.dtypes import widen
from gemma2.merging.kernels.number_formats import KINDS
from gemma2.merging.plan.merge_plan import MergePlan

__all__ = ["constant_tensors"]

PROBE, STEP = 64, 1 << 18  # elements


def constant_tensors(plan: MergePlan, reader: Reader) -> list[str]:
    """Return a warning for each input with constant matrices, or with a vector that is constant in it alone."""
    names = {model.role: _constant(model, reader) for model in plan.models}
    lines = []
    for model in plan.models:
        found = []
        for name, value in names[model.role].items():
            everywhere = all(name in other for other in names.values())
            if len(model.tensors[name].shape) > 1 or not everywhere:
                found.append((name, value))
        if found:
            name, value = found[0]
            others = [other.role for other in plan.models if name in other.tensors and name not in names[other.role]]
            more = f" and {len(found) - 1} more tensors are constant" if len(found) > 1 else ""
            side = f", not constant in {others[0]}" if others else ", as in all models"
            lines.append(
                f"{model}: every element of {printable(name)} is {value:g}{side}{more}: was it saved while its weights "
                "were elsewhere?"
            )
    return lines


def _constant(model: Checkpoint, reader: Reader) -> dict[str, float]:
    """Return the value of every constant tensor of several elements that no adapter changes."""
    found = {}
    for name, tensor in model.tensors.items():
        if tensor.count > 1 and name not in model.updates:
            value = _only_value(tensor, reader)
            if value is not None:
                found[name] = value
    return found


def _only_value(tensor: Tensor, reader: Reader) -> float | None:
    """Return the one value that a tensor holds; None if it holds several, or NaN."""
    first: float | None = None
    position, size = 0, PROBE
    while position < tensor.count:
        count = min(size, tensor.count - position)
        raw = np.empty(count * ITEM_BYTES[tensor.dtype], np.uint8)
        reader.read(tensor, position, count, raw)
        values = np.empty(count, np.float32)
        widen(raw, KINDS[tensor.dtype], values)
        first = float(values[0]) if first is None else first
        if not (values == first).all():
            return None
        position, size = position + count, STEP
    return first
