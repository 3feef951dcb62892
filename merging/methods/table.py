"""How each method turns a group's Gram matrix into weights of its operands, and what it takes.

The operands of a merge are the base, where there is one, then the models in the caller's order. A method needs only
its entry in METHODS; reading, checking, streaming and reporting are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from gemma2.core.errors import UsageError

from .coefficients import (
    Slerp,
    ema_coefficients,
    linear_coefficients,
    liti_coefficients,
    model_stock,
    slerp,
    task_arithmetic,
    warp_coefficients,
)
from .parameters import Number
from .request import DTYPES, Granularity, MergeRequest, Settings
from .spherical import karcher, multislerp, nuslerp

if TYPE_CHECKING:
    from gemma2.merging.kernels.sparse import Sparsity

__all__ = ["METHODS", "Group", "Method", "Mix", "Selection", "check_request"]

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
class Selection:
    """How a method chooses elements of the task vectors, and how it adds up what is left of several.

    by       magnitude: the largest stay; random: with one probability; rank: with one that grows with the magnitude
    elect    per element only the terms of the elected sign count (TIES)
    density  share that stays, where none is given
    gamma    share of the largest elements that is dropped, where none is given
    epsilon  half of the spread of the keep probability, where none is given
    """

    by: Literal["magnitude", "random", "rank"]
    elect: bool
    density: float
    gamma: float = 0.0
    epsilon: float = 0.0

    def of(self, group: Group) -> Sparsity:
        """The group's numbers, without the thresholds that its data decides."""
        from gemma2.merging.kernels.sparse import Sparsity  # its kernels, which a scalar combination need not load

        given = group.settings
        share = given.density or (self.density,) * group.models
        spread = given.epsilon or (self.epsilon,) * group.models
        return Sparsity(
            weights=given.weights or (1.0,) * group.models,
            keep=() if self.by == "magnitude" else share,
            spread=spread if self.by == "rank" else (),
            rescale=given.rescale is not False,
            elect=self.elect,
            normalize=self.elect if given.normalize is None else given.normalize,
            scale=1.0 if given.scale is None else given.scale,
        )

    def ranks(self, group: Group, count: int) -> list[tuple[int, int]]:
        """First and last rank that stays of `count` elements, of each model's task vector."""
        from gemma2.merging.kernels.top_k import kept_ranks

        density = group.settings.density or (self.density,) * group.models
        gamma = group.settings.gamma or (self.gamma,) * group.models
        return [kept_ranks(count, *pair) for pair in zip(density, gamma, strict=True)]


@dataclass(frozen=True)
class Method:
    """One merge method.

    mix          (group, Gram matrix of its vectors (M, M)) -> Mix. The vectors are task vectors where there is a base,
                 else the weights
    adaptive     whether mix looks at the Gram matrix: the data is then read twice
    base         required: the user names it; sought: or it is the parent that all models record; optional: or there is
                 none and the weights themselves are merged; given: only one that is named counts; none: not taken
    models       least and most models
    options      the fields of MergeRequest that it reads besides the common ones
    granularity  its own
    selection    of elements; None for scalar combinations
    """

    mix: Callable[[Group, Doubles], Mix]
    adaptive: bool
    base: Literal["required", "sought", "optional", "given", "none"]
    models: tuple[int, int]
    options: tuple[str, ...]
    granularity: Granularity = "layer"
    selection: Selection | None = None

    @property
    def passes(self) -> int:
        """How often the data is read."""
        thresholds = self.selection is not None and self.selection.by == "magnitude"
        return 2 if self.adaptive or thresholds else 1


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


def _mix_task_arithmetic(group: Group, gram: Doubles) -> Mix:
    given = group.settings
    weights = given.weights or (1.0,) * group.models
    scale = 1.0 if given.scale is None else given.scale
    return _around_base(group, Slerp(task_arithmetic(weights, scale, bool(given.normalize))))


def _mix_model_stock(group: Group, gram: Doubles) -> Mix:
    return _around_base(group, Slerp(model_stock(gram)))


def _mix_nuslerp(group: Group, gram: Doubles) -> Mix:
    return _around_base(group, nuslerp(gram, group.settings.weights, group.name))


def _mix_multislerp(group: Group, gram: Doubles) -> Mix:
    return _around_base(group, multislerp(gram, group.settings.weights, group.name))


def _mix_karcher(group: Group, gram: Doubles) -> Mix:
    given = group.settings
    steps = 100 if given.iterations is None else given.iterations
    tolerance = 1e-8 if given.tolerance is None else given.tolerance
    return _around_base(group, karcher(gram, given.weights, group.name, max_iterations=steps, tolerance=tolerance))


def _mix_selected(group: Group, gram: Doubles) -> Mix:
    """For the report alone: the weights of the task vectors, of which elements are chosen."""
    return Mix(np.array([group.settings.weights or (1.0,) * group.models]))


def _mix_passthrough(group: Group, gram: Doubles) -> Mix:
    return Mix(np.array([[1.0 if group.settings.scale is None else group.settings.scale]]))


def _sum(selection: Selection, *more: str) -> Method:
    """A method that sums selected elements of task vectors."""
    options = ("weights", "density", "normalize", "scale", *more)
    return Method(_mix_selected, False, "required", (1, MANY), options, granularity="tensor", selection=selection)


MANY = 64
PAIR, SEVERAL, ANY = (2, 2), (2, MANY), (1, MANY)
MASKED = ("rescale", "seed")
METHODS = {
    "slerp": Method(_mix_slerp, True, "optional", SEVERAL, ("t",)),
    "warp": Method(_mix_warp, True, "sought", SEVERAL, ("t", "etas")),
    "liti": Method(_mix_liti, False, "required", (1, 1), ("etas",)),
    "linear": Method(_mix_linear, False, "none", ANY, ("weights", "normalize")),
    "ema": Method(_mix_ema, False, "none", SEVERAL, ("decay",)),
    "model-stock": Method(_mix_model_stock, True, "required", SEVERAL, ()),
    "nuslerp": Method(_mix_nuslerp, True, "given", PAIR, ("weights",)),
    "multislerp": Method(_mix_multislerp, True, "given", SEVERAL, ("weights",)),
    "karcher": Method(_mix_karcher, True, "given", SEVERAL, ("weights", "iterations", "tolerance")),
    "task-arithmetic": Method(_mix_task_arithmetic, False, "required", ANY, ("weights", "normalize", "scale")),
    "ties": _sum(Selection("magnitude", elect=True, density=0.2)),
    "breadcrumbs": _sum(Selection("magnitude", elect=False, density=0.9, gamma=0.01), "gamma"),
    "breadcrumbs-ties": _sum(Selection("magnitude", elect=True, density=0.9, gamma=0.01), "gamma"),
    "dare": _sum(Selection("random", elect=False, density=0.5), *MASKED),
    "dare-ties": _sum(Selection("random", elect=True, density=0.5), *MASKED),
    "della": _sum(Selection("rank", elect=True, density=0.5, epsilon=0.1), "epsilon", *MASKED),
    "della-linear": _sum(Selection("rank", elect=False, density=0.5, epsilon=0.1), "epsilon", *MASKED),
    "passthrough": Method(_mix_passthrough, False, "none", ANY, ("scale",)),
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
    if not request.slices:
        _check_counts(request)
    for part in request.slices:
        own = replace(request, models=request.models[: len(part.layers)], **part.changes)
        _check_numbers(own)
        _check_counts(own)
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
        numbers = given if isinstance(given, tuple) else (given,)
        for number in numbers:
            if any(not abs(value) < float("inf") for value in _values(number)):
                raise UsageError(f"--{name} holds a value that is not finite", "give numbers")
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
    if request.method == "passthrough" and models > 1 and not request.slices:
        raise UsageError(f"merge passthrough takes 1 model, {models} given", "stack layers of several by a file")
    _check_spread(request)
    _check_sum(request)


def _check_sum(request: MergeRequest) -> None:
    """Weights that are averaged sum to 1, or to what they can be divided by."""
    plain = [float(weight) for weight in request.weights or () if isinstance(weight, int | float)]
    if not plain or len(plain) < len(request.weights or ()):
        return
    total = sum(plain)
    if request.method == "linear" and request.normalize is None and not abs(total - 1.0) <= 1e-6:
        raise UsageError(f"--weights sum to {total:g}, not 1", "scale them, or give --normalize")
    if request.method in ("linear", "task-arithmetic") and request.normalize and total == 0.0:
        raise UsageError("--weights sum to 0, which --normalize cannot divide by", "leave --normalize out")


def _check_spread(request: MergeRequest) -> None:
    """DELLA's keep probabilities, from density - epsilon to density + epsilon, are probabilities above 0."""
    selection = METHODS[request.method].selection
    if selection is None or selection.by != "rank":
        return
    densities, spreads = request.density or (selection.density,), request.epsilon or (selection.epsilon,)
    models = max(len(densities), len(spreads))
    for at in range(models):
        for density, spread in product(_values(densities[at % len(densities)]), _values(spreads[at % len(spreads)])):
            if not spread < density <= 1.0 - spread:
                raise UsageError(
                    f"--epsilon {spread:g} around --density {density:g} leaves the probabilities above 0 and up to 1",
                    "give a smaller epsilon",
                )
