"""How each method turns a group's Gram matrix into weights of its operands, and what it takes.

The operands of a merge are the base, where there is one, then the models in the caller's order. A method needs only
its entry in METHODS; reading, checking, streaming and reporting are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .coefficients import (
    Slerp,
    ema_coefficients,
    linear_coefficients,
    liti_coefficients,
    slerp,
    warp_coefficients,
)
from .errors import UsageError
from .request import DTYPES, Granularity, MergeRequest, Settings
from .schedule import Number

__all__ = ["METHODS", "Group", "Method", "Mix", "check_request"]

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Tensors of the output that share coefficients, thresholds and settings."""

    name: str
    tensors: tuple[str, ...]
    settings: Settings
    based: bool
    models: int


@dataclass(frozen=True)
class Mix:
    """Weights of the operands, shape (outputs, operands), and why the group fell back to LERP ("" when it did not)."""

    weights: Doubles
    fallback: str = ""


@dataclass(frozen=True)
class Method:
    """One merge method.

    mix          (group, Gram matrix of its vectors (M, M)) -> Mix. The vectors are task vectors where there is a base,
                 else the weights.
    adaptive     whether mix looks at the Gram matrix: the data is then read twice
    base         required: the user names it; sought: or it is the parent that all models record; optional: or there is
                 none and the weights themselves are merged; none: not taken
    models       least and most models
    options      the fields of MergeRequest that it reads besides the common ones
    granularity  its own
    """

    mix: Callable[[Group, Doubles], Mix]
    adaptive: bool
    base: Literal["required", "sought", "optional", "none"]
    models: tuple[int, int]
    options: tuple[str, ...]
    granularity: Granularity = "layer"

    @property
    def passes(self) -> int:
        """How often the data is read."""
        return 2 if self.adaptive else 1


def _around_base(group: Group, found: Slerp) -> Mix:
    """Coefficients of the vectors as weights of the operands; with a base they add up to 1 together with its own."""
    weights = warp_coefficients(found.coefficients, 1.0) if group.based else found.coefficients
    return Mix(weights[None, :], found.fallback)


def _mix_slerp(group: Group, gram: Doubles) -> Mix:
    return _around_base(group, slerp(gram, group.settings.t, group.name))


def _mix_warp(group: Group, gram: Doubles) -> Mix:
    result = slerp(gram, group.settings.t, group.name)
    rows = [warp_coefficients(result.coefficients, eta) for eta in group.settings.etas]
    return Mix(np.stack(rows), result.fallback)


def _mix_liti(group: Group, gram: Doubles) -> Mix:
    return Mix(np.stack([liti_coefficients(eta) for eta in group.settings.etas]))


def _mix_linear(group: Group, gram: Doubles) -> Mix:
    weights = linear_coefficients(group.models, group.settings.weights)
    return Mix((weights / weights.sum() if group.settings.normalize else weights)[None, :])


def _mix_ema(group: Group, gram: Doubles) -> Mix:
    return Mix(ema_coefficients(group.models, group.settings.decay)[None, :])


def _mix_passthrough(group: Group, gram: Doubles) -> Mix:
    return Mix(np.array([[1.0 if group.settings.scale is None else group.settings.scale]]))


MANY = 64
METHODS = {
    "slerp": Method(_mix_slerp, adaptive=True, base="optional", models=(2, MANY), options=("t",)),
    "warp": Method(_mix_warp, adaptive=True, base="sought", models=(2, MANY), options=("t", "etas")),
    "liti": Method(_mix_liti, adaptive=False, base="required", models=(1, 1), options=("etas",)),
    "linear": Method(_mix_linear, adaptive=False, base="none", models=(1, MANY), options=("weights", "normalize")),
    "ema": Method(_mix_ema, adaptive=False, base="none", models=(2, MANY), options=("decay",)),
    "passthrough": Method(_mix_passthrough, adaptive=False, base="none", models=(1, MANY), options=("scale",)),
}
# Fields of a request that only some methods read, and how the user knows them.
SPECIAL = {
    **{
        name: name for name in ("t", "weights", "decay", "scale", "density", "gamma", "epsilon", "normalize", "rescale")
    },
    **{"etas": "eta", "iterations": "iterations", "tolerance": "tolerance"},
}


def check_request(request: MergeRequest) -> MergeRequest:
    """The request with its defaults filled in. Raises UsageError for options that the method does not take."""
    method = METHODS.get(request.method)
    if method is None:
        raise UsageError(f"unknown merge method {request.method!r}", f"choose one of {', '.join(METHODS)}")
    least, most = method.models
    if not least <= len(request.models) <= most:
        wanted = f"{least} model{'s' if least > 1 else ''}" if most == least else f"{least} to {most} models"
        raise UsageError(f"merge {request.method} takes {wanted}, {len(request.models)} given", "see --help")
    for name, flag in SPECIAL.items():
        if getattr(request, name) not in (None, ()) and name not in method.options:
            raise UsageError(f"merge {request.method} does not take --{flag}", "leave it out")
    if request.base is not None and method.base == "none" and not request.slices:
        raise UsageError(f"merge {request.method} does not take --base", "leave it out")
    if request.base is None and method.base == "required":
        raise UsageError(f"merge {request.method} needs --base", "name the init of the models")
    _check_numbers(request)
    for part in request.slices:
        _check_numbers(replace(request, models=request.models[: len(part.layers)], **part.changes))
    filled = replace(request, granularity=request.granularity or method.granularity)
    return filled if request.etas or "etas" not in method.options else replace(filled, etas=(0.3,))


def _values(number: Number | None) -> tuple[float, ...]:
    """Every value that a number can take at the corners of its schedule."""
    if number is None:
        return ()
    if isinstance(number, int | float):
        return (number,)
    points = [point for rule in number.rules for point in rule.points]
    return (*points, *(() if number.default is None else (number.default,)))


def _check_numbers(request: MergeRequest) -> None:
    shares: dict[str, Sequence[Number | None]] = {
        **{"t": (request.t,), "eta": request.etas, "decay": (request.decay,)},
        **{"density": request.density or (), "gamma": request.gamma or (), "epsilon": request.epsilon or ()},
    }
    for name, numbers in shares.items():
        for value in (value for number in numbers for value in _values(number)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"--{name} {value:g} is not between 0 and 1", "give a share")
    for name in ("weights", "scale"):
        given = getattr(request, name)
        for number in given if isinstance(given, tuple) else (given,):
            if any(not abs(value) < float("inf") for value in _values(number)):
                raise UsageError(f"--{name} holds a value that is not finite", "give numbers")
    _check_counts(request)
    if request.granularity not in (None, "layer", "tensor", "model"):
        raise UsageError(f"unknown --granularity {request.granularity!r}", "choose layer, tensor or model")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {request.dtype!r}", f"choose one of {', '.join(DTYPES)}")
    if request.threads < 1:
        raise UsageError(f"--threads {request.threads} is less than 1", "give 1 or more")


def _check_counts(request: MergeRequest) -> None:
    """As many numbers as models, and weights that sum to what they must."""
    models = len(request.models)
    if request.t is not None and models != 2:
        raise UsageError(f"--t is for two models, {models} given", "leave it out: lambda is 1/k")
    if len(set(request.etas)) != len(request.etas):
        raise UsageError("--eta names a value twice", "give each once")
    if request.weights is not None and len(request.weights) != models:
        raise UsageError(f"{len(request.weights)} weights for {models} models", "give one per model")
    for name in ("density", "gamma", "epsilon"):
        given = getattr(request, name)
        if given is not None and len(given) not in (1, models):
            raise UsageError(f"{len(given)} values of --{name} for {models} models", "give one, or one per model")
    plain = request.weights is not None and all(isinstance(weight, int | float) for weight in request.weights)
    if request.method == "linear" and plain and not request.normalize:
        total = sum(float(weight) for weight in request.weights or ())  # type: ignore[arg-type]
        if not abs(total - 1.0) <= 1e-6:  # NaN is not close either
            raise UsageError(f"--weights sum to {total:g}, not 1", "scale them, or give --normalize")
