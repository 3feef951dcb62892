"""Averages on a sphere: NuSLERP, multi-SLERP and the Karcher mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .method import MANY, Group, MergekitForm, Method, Mix, around_base
from .option import ITERATIONS, NORMALIZE, TOLERANCE, WEIGHTS

if TYPE_CHECKING:
    from .method import Doubles

__all__ = ["METHODS"]

MOST_ITERATIONS, SHORTEST_STEP = 100, 1e-8
WEIGHT = {"weight": ("weights", None)}


def _mix_nuslerp(group: Group, gram: Doubles) -> Mix:
    from .spherical import nuslerp

    found = nuslerp(gram, group.settings.weights, group.name)
    return around_base(group, found.coefficients, found.fallback)


def _mix_multislerp(group: Group, gram: Doubles) -> Mix:
    from .spherical import multislerp

    found = multislerp(gram, group.settings.weights, group.name)
    return around_base(group, found.coefficients, found.fallback)


def _mix_karcher(group: Group, gram: Doubles) -> Mix:
    from .spherical import karcher

    given = group.settings
    steps = MOST_ITERATIONS if given.iterations is None else given.iterations
    tolerance = SHORTEST_STEP if given.tolerance is None else given.tolerance
    found = karcher(gram, given.weights, group.name, max_iterations=steps, tolerance=tolerance)
    total = 1.0 if given.normalize is not False else sum(given.weights or (1.0,) * group.models)
    return around_base(group, total * found.coefficients, found.fallback)


METHODS = {
    "nuslerp": Method(
        help="SLERP of two models by relative weights, of their task vectors with --base, else of the weights "
        "themselves.",
        why="SLERP of two models by relative weights",
        example="gemma2 merge nuslerp a b --weights 1,3 --base base --out merged",
        panel="Averages on a sphere",
        mix=_mix_nuslerp,
        adaptive=True,
        base="given",
        models=(2, 2),
        options=(WEIGHTS,),
        mergekit={
            "slerp": MergekitForm("required", {}, {"t": ("t", None)}),
            "nuslerp": MergekitForm("optional", WEIGHT, {}, {"nuslerp_row_wise": None}),
        },
    ),
    "multislerp": Method(
        help="Weighted mean of directions in the tangent space at their mean; of task vectors with --base.",
        why="averages directions in the tangent space at their mean",
        example="gemma2 merge multislerp a b c --weights 1,1,2 --out merged",
        panel="Averages on a sphere",
        mix=_mix_multislerp,
        adaptive=True,
        base="given",
        models=(2, MANY),
        options=(WEIGHTS,),
    ),
    "karcher": Method(
        help="Karcher mean: the point of the sphere with the least squared angles to the models.",
        why="takes the Karcher mean of the models' directions",
        example="gemma2 merge karcher a b c --out merged",
        panel="Averages on a sphere",
        mix=_mix_karcher,
        adaptive=True,
        base="given",
        models=(2, MANY),
        options=(WEIGHTS, ITERATIONS, TOLERANCE, NORMALIZE),
        defaults={"iterations": MOST_ITERATIONS, "tolerance": SHORTEST_STEP},
        mergekit={
            "karcher": MergekitForm("input", {}, {"max_iter": ("iterations", 10), "tol": ("tolerance", 1e-5)}),
            # Its one step in the tangent space of the mean direction is nil: what remains is where the Karcher mean
            # starts.
            "multislerp": MergekitForm(
                "optional", WEIGHT, {"normalize_weights": ("normalize", True)}, {"eps": 1e-8}, {"iterations": 0}
            ),
        },
    ),
}
