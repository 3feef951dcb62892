"""What can be asked for, and how each method turns a group's Gram matrix into weights of its operands.

The operands of a merge are the base, where there is one, then the models in the caller's order. A method needs only
its entry in METHODS; reading, checking, streaming and reporting are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .coefficients import (
    ema_coefficients,
    linear_coefficients,
    liti_coefficients,
    slerp,
    warp_coefficients,
)
from .errors import UsageError

__all__ = ["DTYPES", "METHODS", "MergeRequest", "Method", "Mix", "check_request"]

Doubles = NDArray[np.float64]
Granularity = Literal["layer", "tensor", "model"]

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """One merge as the user asks for it.

    method       slerp, liti, warp, linear or ema
    models       model directories; their order counts for slerp and warp of three or more, and for ema
    base         the init that task vectors start from (slerp, warp), or that the result is interpolated to (liti)
    t            slerp of two models: 0 is the first, 1 the second; 1/2 when None
    etas         liti and warp: share of the merged model, 0 is the base; several give one output each
    weights      linear: one per model, summing to 1; uniform when None
    decay        ema: of the recursion over the checkpoints; None is their uniform average
    granularity  what shares one set of coefficients: a transformer layer, a tensor, or the whole model
    dtype        of the output: bfloat16, float16 or float32; that of the first model when None
    threads      that read, compute and write side by side
    """

    method: str
    models: tuple[Path, ...]
    base: Path | None = None
    t: float | None = None
    etas: tuple[float, ...] = ()
    weights: tuple[float, ...] | None = None
    decay: float | None = None
    granularity: Granularity = "layer"
    dtype: str | None = None
    threads: int = 2

    def options(self) -> dict[str, object]:
        """What was asked for, without the paths: recorded in the manifest."""
        given = {"t": self.t, "weights": self.weights, "decay": self.decay, "dtype": self.dtype}
        fixed = {"method": self.method, "etas": list(self.etas), "granularity": self.granularity}
        return fixed | {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Mix:
    """Weights of the operands, shape (outputs, operands), and why the group fell back to LERP ("" when it did not)."""

    weights: Doubles
    fallback: str = ""


@dataclass(frozen=True)
class Method:
    """One merge method.

    mix      (request, Gram matrix of the group's vectors (M, M), name of the group) -> Mix. The vectors are task
             vectors where there is a base, else the weights.
    adaptive whether mix looks at the Gram matrix: the data is then read twice
    base     required: the user names it; sought: or it is the parent that all models record; optional: or there is
             none and the weights themselves are merged; none: not taken
    models   least and most models
    options  the fields of MergeRequest that it reads besides the common ones
    """

    mix: Callable[[MergeRequest, Doubles, str], Mix]
    adaptive: bool
    base: Literal["required", "sought", "optional", "none"]
    models: tuple[int, int]
    options: tuple[str, ...]


def _mix_slerp(request: MergeRequest, gram: Doubles, group: str) -> Mix:
    result = slerp(gram, request.t, group)
    weights = result.coefficients if request.base is None else warp_coefficients(result.coefficients, 1.0)
    return Mix(weights[None, :], result.fallback)


def _mix_warp(request: MergeRequest, gram: Doubles, group: str) -> Mix:
    result = slerp(gram, request.t, group)
    return Mix(np.stack([warp_coefficients(result.coefficients, eta) for eta in request.etas]), result.fallback)


def _mix_liti(request: MergeRequest, gram: Doubles, group: str) -> Mix:
    return Mix(np.stack([liti_coefficients(eta) for eta in request.etas]))


def _mix_linear(request: MergeRequest, gram: Doubles, group: str) -> Mix:
    return Mix(linear_coefficients(len(request.models), request.weights)[None, :])


def _mix_ema(request: MergeRequest, gram: Doubles, group: str) -> Mix:
    return Mix(ema_coefficients(len(request.models), request.decay)[None, :])


MANY = 64
METHODS = {
    "slerp": Method(_mix_slerp, adaptive=True, base="optional", models=(2, MANY), options=("t",)),
    "warp": Method(_mix_warp, adaptive=True, base="sought", models=(2, MANY), options=("t", "etas")),
    "liti": Method(_mix_liti, adaptive=False, base="required", models=(1, 1), options=("etas",)),
    "linear": Method(_mix_linear, adaptive=False, base="none", models=(2, MANY), options=("weights",)),
    "ema": Method(_mix_ema, adaptive=False, base="none", models=(2, MANY), options=("decay",)),
}


def check_request(request: MergeRequest) -> MergeRequest:
    """The request with its defaults filled in. Raises UsageError for options that the method does not take."""
    method = METHODS.get(request.method)
    if method is None:
        raise UsageError(f"unknown merge method {request.method!r}", f"choose one of {', '.join(METHODS)}")
    least, most = method.models
    if not least <= len(request.models) <= most:
        wanted = f"{least} model" if most == least else f"{least} to {most} models"
        raise UsageError(f"merge {request.method} takes {wanted}, {len(request.models)} given", "see --help")
    for name in ("t", "etas", "weights", "decay"):
        if getattr(request, name) not in (None, ()) and name not in method.options:
            flag = "eta" if name == "etas" else name
            raise UsageError(f"merge {request.method} does not take --{flag}", "leave it out")
    if request.base is not None and method.base == "none":
        raise UsageError(f"merge {request.method} does not take --base", "leave it out")
    if request.base is None and method.base == "required":
        raise UsageError(f"merge {request.method} needs --base", "name the init to interpolate to")
    _check_numbers(request)
    return request if request.etas or "etas" not in method.options else replace(request, etas=(0.3,))


def _check_numbers(request: MergeRequest) -> None:
    shares = {"t": (request.t,), "eta": request.etas, "decay": (request.decay,)}
    for name, values in shares.items():
        for value in values:
            if value is not None and not 0.0 <= value <= 1.0:
                raise UsageError(f"--{name} {value:g} is not between 0 and 1", "give a share of the second model")
    if request.t is not None and len(request.models) != 2:
        raise UsageError(f"--t is for two models, {len(request.models)} given", "leave it out: lambda is 1/k")
    if len(set(request.etas)) != len(request.etas):
        raise UsageError("--eta names a value twice", "give each once")
    if request.weights is not None:
        if len(request.weights) != len(request.models):
            raise UsageError(f"{len(request.weights)} weights for {len(request.models)} models", "give one per model")
        if not abs(sum(request.weights) - 1.0) <= 1e-6:  # NaN is not close either
            raise UsageError(f"--weights sum to {sum(request.weights):g}, not 1", "scale them")
    if request.granularity not in ("layer", "tensor", "model"):
        raise UsageError(f"unknown --granularity {request.granularity!r}", "choose layer, tensor or model")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {request.dtype!r}", f"choose one of {', '.join(DTYPES)}")
    if request.threads < 1:
        raise UsageError(f"--threads {request.threads} is less than 1", "give 1 or more")
