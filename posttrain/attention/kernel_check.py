"""An attention kernel against eager attention, forward and backward, where soft cap, window and padding matter.

    d(A, B) = rms(A - B) / rms(B)      over the tokens that are present; A: kernel, B: eager in fp32

of the last hidden states, and of the gradients of the query, key and value projections, the largest of them. Two
distances bound what a right kernel may show, both measured on the machine at hand:

    rounding   eager in the precision of the command, from eager in fp32 (fp32: from fp64)
    dropped    eager in fp32 without the soft cap, without the window, without the padding mask, without the borders of
               packed rows; the smallest of them
    limit      sqrt(rounding * dropped): as many times the rounding as it is below the smallest fault

The network is `probe_network.py`'s.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemma2.core.json_files import JsonObject

from .probe_network import LENGTH, ProbeRows, probe_rows, small_network

__all__ = ["KernelCheck", "Precision", "check_kernel"]

# How a command computes: in this dtype, or with fp32 weights under bf16 autocast.
Precision = Literal["float32", "bfloat16", "autocast"]
PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


@dataclass(frozen=True)
class ProbeOutcome:
    """The outcome of one form of rows: states (N, d), and the gradient of each projection; both fp64 on the CPU."""

    states: Tensor
    gradients: Mapping[str, Tensor]

    def distances(self, other: ProbeOutcome) -> ProbeDistances:
        """From another outcome, which is the reference."""
        found = [_distance(self.gradients[name], other.gradients[name]) for name in other.gradients]
        return ProbeDistances(_distance(self.states, other.states), max(found, default=0.0))


@dataclass(frozen=True)
class ProbeDistances:
    """ProbeDistances of states, and of gradients (0 where none were computed)."""

    states: float
    gradients: float

    def within(self, limit: ProbeDistances) -> bool:
        """Whether both are at most those of `limit`; NaN is not."""
        return self.states <= limit.states and self.gradients <= limit.gradients


@dataclass(frozen=True)
class KernelCheck:
    """A kernel against eager attention.

    kernel     its name in transformers
    precision  in which it was compared
    rows       the form of rows in which it was farthest off
    off        by how much it is off there
    limit      what it may be off by
    learns     whether gradients were compared
    nearest    what it computes there, if it is outside of the limit: "without the soft cap", or ""
    """

    kernel: str
    precision: Precision
    rows: str
    off: ProbeDistances
    limit: ProbeDistances
    learns: bool
    nearest: str = ""

    @property
    def right(self) -> bool:
        """Whether it computes the same attention."""
        return self.off.within(self.limit)

    def figures(self) -> str:
        """The distances, in words."""
        found = f"{self.off.states:.2g} of the states' size (limit {self.limit.states:.2g})"
        if self.learns:
            found += f", {self.off.gradients:.2g} of the gradients' (limit {self.limit.gradients:.2g})"
        words = {"autocast": "bf16 autocast", "float32": "fp32", "bfloat16": "bf16"}[self.precision]
        where = f" on {self.rows} rows" if not self.right else ""
        return f"off eager attention by {found} in {words}{where}" + (f": {self.nearest}" if self.nearest else "")

    def record(self) -> JsonObject:
        """For a manifest."""
        found: JsonObject = {"precision": self.precision, "states": self.off.states, "limit": self.limit.states}
        if self.learns:
            found |= {"gradients": self.off.gradients, "limit_of_gradients": self.limit.gradients}
        return found


def check_kernel(
    settings: Mapping[str, object],
    kernel: str,
    precision: Precision,
    device: torch.device,
    *,
    learns: bool,
    packed: bool = False,
) -> KernelCheck:
    """Compare a kernel with eager attention on the network of a config.json; `packed`: also on packed rows.

    Raises whatever the kernel raises where it cannot run.
    """
    try:
        return _compared(settings, kernel, precision, device, learns, packed)
    finally:  # what was compiled for the probe would count against torch's limit of recompilations in the run
        if kernel == "flex_attention":
            torch._dynamo.reset()


def _compared(
    settings: Mapping[str, object],
    kernel: str,
    precision: Precision,
    device: torch.device,
    learns: bool,
    packed: bool,
) -> KernelCheck:
    network = small_network(settings).to(device)
    forms = {name: rows for name, rows in probe_rows().items() if packed or name != "packed"}
    found = []
    rounding, faults = ProbeDistances(0.0, 0.0), []
    wide = copy.deepcopy(network).double() if precision == "float32" else network
    for name, rows in forms.items():
        reference = _eager(network, rows, learns)
        faults += [(name, what, run) for what, run in _faulty(network, rows, learns)]
        exact = _eager(wide, rows, learns) if precision == "float32" else reference
        own = (reference if precision == "float32" else _run(network, rows, "eager", precision, learns)).distances(
            exact
        )
        rounding = ProbeDistances(max(rounding.states, own.states), max(rounding.gradients, own.gradients))
        found.append((name, _run(network, rows, kernel, precision, learns), reference))
    references = {name: reference for name, _, reference in found}
    dropped = [run.distances(references[name]) for name, _, run in faults]
    dropped = [one for one in dropped if one.states > 0]  # a model with no local layer does not miss its window
    limit = ProbeDistances(
        math.sqrt(rounding.states * min(one.states for one in dropped)),
        math.sqrt(rounding.gradients * min(one.gradients for one in dropped)),
    )
    worst = max(found, key=lambda one: _excess(one[1].distances(one[2]), limit))
    off = worst[1].distances(worst[2])
    near = {
        what: run_of.distances(run).states
        for form, run_of, reference in found
        for name, what, run in faults
        if name == form and not run_of.distances(reference).within(limit)
    }
    nearest = min(near, key=lambda what: near[what], default="")
    wrong = near.get(nearest, math.inf) < off.states
    return KernelCheck(kernel, precision, worst[0], off, limit, learns, nearest if wrong else "")


def _excess(off: ProbeDistances, limit: ProbeDistances) -> float:
    found = max(off.states / limit.states, off.gradients / limit.gradients if limit.gradients else 0.0)
    return found if math.isfinite(found) else math.inf


def _distance(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).square().mean().sqrt() / reference.square().mean().sqrt())


def _eager(network: PreTrainedModel, rows: ProbeRows, learns: bool) -> ProbeOutcome:
    """Eager attention in the dtype of the weights: the truth. Packed rows are read one by one."""
    if not rows.alone:
        return _run(network, rows, "eager", "float32", learns)
    ones = [ProbeRows(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in rows.alone]
    starts = [0, rows.alone[0].shape[1]]
    parts = [_run(network, one, "eager", "float32", learns, start) for one, start in zip(ones, starts, strict=True)]
    names = parts[0].gradients
    return ProbeOutcome(
        torch.cat([part.states for part in parts]),
        {name: sum((part.gradients[name] for part in parts), torch.zeros(())) for name in names},
    )


def _run(
    network: PreTrainedModel, rows: ProbeRows, kernel: str, precision: Precision, learns: bool, start: int = 0
) -> ProbeOutcome:
    """Read rows with a kernel; `start`: the number of the first token, which chooses the directions of the gradient."""
    device = network.device
    before = network.config._attn_implementation
    if precision == "bfloat16":
        network = copy.deepcopy(network).bfloat16()
    network.config._attn_implementation = kernel
    arguments = {"attention_mask": rows.mask, "position_ids": rows.positions}
    inputs = {name: tensor.to(device) for name, tensor in arguments.items() if tensor is not None}
    network.zero_grad()
    try:
        with torch.set_grad_enabled(learns):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
                states = network.base_model(input_ids=rows.ids.to(device), use_cache=False, **inputs).last_hidden_state
            if learns:
                (states * _directions(states, rows, start)).sum().backward()
    finally:
        network.config._attn_implementation = before
    gradients = {
        name: (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).detach().double().cpu()
        for name, parameter in network.named_parameters()
        if learns and name.endswith(PROJECTIONS)
    }
    return ProbeOutcome(states.detach().double().cpu()[rows.present], gradients)


def _directions(states: Tensor, rows: ProbeRows, start: int) -> Tensor:
    """Fixed numbers of about 1 with the shape of the states, 0 where there is no token."""
    batch, tokens, width = states.shape
    numbers = torch.arange(batch * LENGTH * width, dtype=torch.float64).view(batch, LENGTH, width)
    found = torch.sin(numbers * 12.9898)[:, start : start + tokens] * rows.present[..., None]
    return found.to(states.device, states.dtype)


def _faulty(network: PreTrainedModel, rows: ProbeRows, learns: bool) -> Iterator[tuple[str, ProbeOutcome]]:
    """Eager attention without each part that a kernel may drop, on a form of rows, where the part matters there."""
    layers = [module for module in network.modules() if hasattr(module, "scaling") and hasattr(module, "q_proj")]
    capped = [layer for layer in layers if getattr(layer, "attn_logit_softcapping", None) is not None]
    if capped and not rows.alone:
        with _changed([(layer, "attn_logit_softcapping", None) for layer in capped]):
            yield "without the soft cap", _eager(network, rows, learns)
    if getattr(network.config, "sliding_window", None) and not rows.alone:
        local = [layer for layer in layers if getattr(layer, "sliding_window", None) is not None]
        places = [(place, "sliding_window", 2 * LENGTH) for place in (network.config, *local)]
        with _changed(places):
            yield "without the window", _eager(network, rows, learns)
    if rows.mask is not None:
        whole = ProbeRows(rows.ids, rows.present)
        yield "without the padding mask", _run(network, whole, "eager", "float32", learns)
    if rows.alone:  # a mask of ones keeps transformers from looking for borders
        joined = ProbeRows(rows.ids, rows.present, torch.ones_like(rows.ids), rows.positions)
        yield "without the borders of packed rows", _run(network, joined, "eager", "float32", learns)


@contextmanager
def _changed(changes: Sequence[tuple[object, str, object]]) -> Iterator[None]:
    """Set attributes while the context is open."""
    before = [(place, name, getattr(place, name)) for place, name, _ in changes]
    for place, name, value in changes:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, old in before:
            setattr(place, name, old)
