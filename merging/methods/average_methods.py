"""Averages: weighted and exponential means of the weights, and Model Stock (arXiv 2403.19522)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2.core.errors import UsageError

from .method import MANY, Group, MergekitForm, Method, Mix, around_base
from .option import DECAY, NORMALIZE, UNIFORM, WEIGHTS
from .request import MergeRequest

if TYPE_CHECKING:
    from .method import Doubles

__all__ = ["METHODS", "sum_of_weights"]


def _mix_linear(group: Group, gram: Doubles) -> Mix:
    from .coefficients import linear_coefficients

    weights = linear_coefficients(group.models, group.settings.weights)
    return Mix((weights / weights.sum() if group.settings.normalize else weights)[None, :])


def _mix_ema(group: Group, gram: Doubles) -> Mix:
    from .coefficients import ema_coefficients

    return Mix(ema_coefficients(group.models, group.settings.decay)[None, :])


def _mix_model_stock(group: Group, gram: Doubles) -> Mix:
    from .coefficients import model_stock

    return around_base(group, model_stock(gram))


OTHERS = "give other weights"
AS_GIVEN = "--no-normalize"


def sum_of_weights(request: MergeRequest) -> float | None:
    """The sum of the weights; None where none are given, or where some differ between tensors.

    Raises UsageError where `normalize` would divide by a sum of 0.
    """
    plain = [float(weight) for weight in request.weights or () if isinstance(weight, int | float)]
    if not plain or len(plain) < len(request.weights):
        return None
    total = sum(plain)
    if request.normalize and total == 0.0:
        raise UsageError("--weights sum to 0, which --normalize cannot divide by", f"{OTHERS}, or {AS_GIVEN}")
    return total


def _weights_sum_to_1(request: MergeRequest) -> None:
    total = sum_of_weights(request)
    if total is not None and request.normalize is None and not abs(total - 1.0) <= 1e-6:
        way = "scale them, give --normalize" if total else OTHERS
        raise UsageError(f"--weights sum to {total:g}, not 1", f"{way}, or {AS_GIVEN} to take them as they are")


METHODS = {
    "linear": Method(
        help="Weighted average of the weights. Uniform for reward models is WARM.",
        why="averages weights",
        example="gemma2 merge linear rm-1 rm-2 rm-3 --out rm",
        panel="Averages",
        mix=_mix_linear,
        base="none",
        models=(1, MANY),
        options=(WEIGHTS, NORMALIZE),
        check=_weights_sum_to_1,
        mergekit={
            "linear": MergekitForm("input", {"weight": ("weights", None)}, {"normalize": ("normalize", True)}),
        },
    ),
    "ema": Method(
        help="Exponential moving average over checkpoints, oldest first.",
        why="averages checkpoints with exponentially falling weights",
        example="gemma2 merge ema step-100 step-200 step-300 --decay 0.9 --out averaged",
        panel="Averages",
        mix=_mix_ema,
        base="none",
        models=(2, MANY),
        options=(DECAY, UNIFORM),
        one_of=("decay", "uniform"),
    ),
    "model-stock": Method(
        help="Average of the models, drawn to the base as far as the angle between their task vectors asks for.",
        why="averages models, drawn to the base as far as their angle asks for",
        example="gemma2 merge model-stock run-1 run-2 run-3 --base base --out merged",
        panel="Averages",
        mix=_mix_model_stock,
        adaptive=True,
        base="required",
        models=(2, MANY),
        mergekit={"model_stock": MergekitForm("required", only={"filter_wise": False})},
    ),
}
