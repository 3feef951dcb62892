"""What a run holds in memory when that is exhausted: bytes by part, and what it was doing. Torch-free.

Parts are named by the command (`Run.holds`). Tensors are found by walking from each part, and each storage counts once,
for the first part that holds it: adapters that share the base with a reference, or tied weights, are not counted twice.
The activity is read from the traceback, so that nothing has to be kept up to date while a run works.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Protocol, cast

__all__ = ["Holds", "activity", "in_use", "resident"]

Holds = Mapping[str, Callable[[], object]]  # the name of a part -> what is asked for it when memory is exhausted

MOST = 10_000  # items of a container that are walked: a list of models is short, a vocabulary is not
# The end of a file's path, the name of a function ("" for any) and what it does; the innermost frame that fits counts.
ACTIVITIES = (
    ("models/loading.py", "", "loading of a model"),
    ("rl/rollout.py", "draw", "sampling"),
    ("rl/rollout.py", "scores", "scoring by the reward"),
    ("rl/rollout.py", "log_ratios", "scoring by the anchor"),
    ("rl/rlhf.py", "measure", "evaluation"),
    ("training/heldout.py", "", "evaluation"),
    ("", "compute_loss", "loss"),
    ("", "_compute_loss", "loss"),
    ("accelerate/accelerator.py", "backward", "backward pass"),
    ("accelerate/optimizer.py", "step", "optimizer step"),
    ("", "_save_checkpoint", "checkpoint"),
)
# Of CUDA's message: what tensors take at that moment, before the error frees some of them.
ALLOCATED = re.compile(r"([\d.]+) ([KMGT])iB is allocated by PyTorch")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class _Storage(Protocol):
    def data_ptr(self) -> int: ...

    def nbytes(self) -> int: ...


class _Tensor(Protocol):
    device: object

    def untyped_storage(self) -> _Storage: ...


def activity(error: BaseException) -> str:
    """Return what the innermost known function of a traceback does; "" if none is known."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for file, function, words in ACTIVITIES:
            if frame.filename.endswith(file) and function in ("", frame.name):
                return words
    return ""


def in_use(error: BaseException) -> float | None:
    """Return the bytes of all tensors on the device, as CUDA's message has them; None for another message."""
    found = ALLOCATED.search(str(error))
    return float(found[1]) * UNITS[found[2]] if found else None


def resident(holds: Holds, on_host: bool) -> dict[str, int]:
    """Return the bytes of each part in the memory of the host or of accelerators; empty parts are left out."""
    counted: set[int] = set()
    found: dict[str, int] = {}
    for name, asked in holds.items():
        total = 0
        for tensor in _tensors(asked()):
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a sharded one what is here
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if str(tensor.device).startswith("cpu") == on_host and place and place not in counted:
                counted.add(place)
                total += storage.nbytes()
        if total:
            found[name] = total
    return found


def _tensors(thing: object) -> Iterator[_Tensor]:
    """Yield the tensors that are reached from a tensor, module, optimizer, container, function or object of gemma2."""
    waiting, met = [thing], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in met:
            continue
        met.add(id(one))
        if hasattr(one, "untyped_storage"):
            yield cast(_Tensor, one)
        else:
            waiting += _held_by(one)


def _held_by(one: object) -> list[object]:
    if isinstance(one, Mapping):
        return list(one.values()) if len(one) <= MOST else []
    if isinstance(one, list | tuple | set):
        return list(one) if len(one) <= MOST else []
    if isinstance(one, FunctionType):
        return [cell.cell_contents for cell in one.__closure__ or () if _is_filled(cell)]
    if isinstance(one, MethodType):
        return [one.__self__]
    if isinstance(one, partial):
        return [one.func, *one.args, *one.keywords.values()]
    parameters, buffers = getattr(one, "parameters", None), getattr(one, "buffers", None)
    if callable(parameters) and callable(buffers):  # a module
        return [*parameters(), *buffers()]
    if hasattr(one, "param_groups"):  # an optimizer
        return [getattr(one, "state", None)]
    return list(vars(one).values()) if type(one).__module__.startswith("gemma2.") and hasattr(one, "__dict__") else []


def _is_filled(cell: object) -> bool:
    try:
        return cell.cell_contents is not None  # type: ignore[attr-defined]
    except ValueError:
        return False
