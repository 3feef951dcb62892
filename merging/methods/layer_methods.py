"""Passthrough: a model as it is, scaled, or layers of several models stacked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2.core.errors import UsageError

from .method import MANY, Group, MergekitForm, Method, Mix
from .option import SCALE
from .request import MergeRequest

if TYPE_CHECKING:
    from .method import Doubles

__all__ = ["METHODS"]


def _mix_passthrough(group: Group, gram: Doubles) -> Mix:
    import numpy as np

    return Mix(np.array([[1.0 if group.settings.scale is None else group.settings.scale]]))


def _one_model_or_slices(request: MergeRequest) -> None:
    if len(request.models) > 1 and not request.slices:
        raise UsageError(
            f"merge passthrough takes 1 model, {len(request.models)} given", "stack layers of several with slices"
        )


METHODS = {
    "passthrough": Method(
        help="A model as it is, or its weights times --scale. Layers of several models are stacked with --slices.",
        why="takes a model as it is",
        example="gemma2 merge passthrough model --dtype bfloat16 --out smaller",
        panel="Layers",
        mix=_mix_passthrough,
        base="none",
        models=(1, MANY),
        options=(SCALE,),
        check=_one_model_or_slices,
        mergekit={"passthrough": MergekitForm("none", {"scale": ("scale", 1.0)})},
    ),
}
