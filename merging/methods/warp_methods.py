"""The merges of WARP (arXiv 2406.16768): SLERP of task vectors, LITI, and both as one combination."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2.core.errors import UsageError

from .method import MANY, Group, Method, Mix, around_base
from .option import ETA, T
from .request import MergeRequest

if TYPE_CHECKING:
    from .method import Doubles

__all__ = ["METHODS"]

ETAS = {"etas": (0.3,)}


def _mix_slerp(group: Group, gram: Doubles) -> Mix:
    from .coefficients import slerp

    found = slerp(gram, group.settings.t, group.name)
    return around_base(group, found.coefficients, found.fallback)


def _mix_warp(group: Group, gram: Doubles) -> Mix:
    import numpy as np

    from .coefficients import slerp, warp_coefficients

    result = slerp(gram, group.settings.t, group.name)
    rows = [warp_coefficients(result.coefficients, eta) for eta in group.settings.etas]
    return Mix(np.stack(rows), result.fallback)


def _mix_liti(group: Group, gram: Doubles) -> Mix:
    import numpy as np

    from .coefficients import liti_coefficients

    return Mix(np.stack([liti_coefficients(eta) for eta in group.settings.etas]))


def _t_is_for_two(request: MergeRequest) -> None:
    if request.t is not None and len(request.models) != 2:
        raise UsageError(f"--t is for two models, {len(request.models)} given", "leave it out: lambda is 1/k")


METHODS = {
    "slerp": Method(
        help="Spherical interpolation of task vectors (WARP stage 2), one angle per layer. Three or more models are "
        "merged one after the other, the k-th with weight 1/k. Without --base it is the parent that the models "
        "record, else the weights themselves.",
        why="merges policies on the sphere: task vectors by spherical interpolation, one angle per layer",
        example="gemma2 merge slerp rl-1 rl-2 --base sft --out merged",
        panel="WARP",
        mix=_mix_slerp,
        adaptive=True,
        base="optional",
        models=(2, MANY),
        options=(T,),
        check=_t_is_for_two,
    ),
    "liti": Method(
        help="Linear interpolation from the init towards a merged model (WARP stage 3): (1 - eta) base + eta model.",
        why="goes from the init part of the way towards the merge: linear interpolation",
        example="gemma2 merge liti merged --base sft --eta 0.1,0.3,0.5 --out front",
        panel="WARP",
        mix=_mix_liti,
        base="required",
        models=(1, 1),
        options=(ETA,),
        defaults={"eta": 0.3},
        filled=ETAS,
    ),
    "warp": Method(
        help="SLERP, then LITI, as one combination: no model in between.",
        why="SLERP and LITI in one combination",
        example="gemma2 merge warp rl-1 rl-2 --base sft --eta 0.3 --out next-init",
        panel="WARP",
        mix=_mix_warp,
        adaptive=True,
        base="sought",
        models=(2, MANY),
        options=(T, ETA),
        defaults={"eta": 0.3},
        filled=ETAS,
        check=_t_is_for_two,
    ),
}
