"""Sums of task vectors: task arithmetic, TIES, DARE, DELLA, Model Breadcrumbs.

Task arithmetic arXiv 2212.04089, TIES 2306.01708, DARE 2311.03099, DELLA 2406.11617, Breadcrumbs 2312.06795.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from gemma2.core.errors import UsageError

from .average_methods import sum_of_weights
from .method import MANY, Group, MergekitForm, Method, Mix, Selection, Term, around_base
from .option import (
    DENSITY,
    EPSILON,
    GAMMA,
    NORMALIZE,
    RESCALE,
    SCALE,
    SEED,
    WEIGHTS,
    Option,
)
from .parameters import values_of
from .request import MergeRequest

if TYPE_CHECKING:
    from .method import Doubles

__all__ = ["METHODS"]

SUMS = "Sums of task vectors"
MASKED = (RESCALE, SEED)

# mergekit's parameters: of a model, then of the merge.
WEIGHT: dict[str, Term] = {"weight": ("weights", None)}
SPARSE = WEIGHT | {"density": ("density", 1.0)}
OUTLIERS = SPARSE | {"gamma": ("gamma", 0.01)}
RANKED = SPARSE | {"epsilon": ("epsilon", 0.15)}
RESCALED: dict[str, Term] = {"rescale": ("rescale", True)}


def _summed(normalize: bool) -> dict[str, Term]:
    return {"normalize": ("normalize", normalize), "lambda": ("scale", 1.0)}


def _mix_task_arithmetic(group: Group, gram: Doubles) -> Mix:
    from .coefficients import task_arithmetic

    given = group.settings
    weights = given.weights or (1.0,) * group.models
    scale = 1.0 if given.scale is None else given.scale
    return around_base(group, task_arithmetic(weights, scale, bool(given.normalize)))


def _mix_selected(group: Group, gram: Doubles) -> Mix:
    """For the report alone: the weights of the task vectors, of which elements are chosen."""
    import numpy as np

    return Mix(np.array([group.settings.weights or (1.0,) * group.models]))


def _sum_is_not_0(request: MergeRequest) -> None:
    sum_of_weights(request)


def _probabilities(selection: Selection, request: MergeRequest) -> None:
    """DELLA's keep probabilities, from density - epsilon to density + epsilon, are probabilities above 0."""
    densities, spreads = request.density or (selection.density,), request.epsilon or (selection.epsilon,)
    for at in range(max(len(densities), len(spreads))):
        pairs = product(values_of(densities[at % len(densities)]), values_of(spreads[at % len(spreads)]))
        for density, spread in pairs:
            if not spread < density <= 1.0 - spread:
                raise UsageError(
                    f"--epsilon {spread:g} around --density {density:g} leaves the probabilities above 0 and up to 1",
                    "give a smaller epsilon",
                )


def _sum(
    help: str, why: str, example: str, selection: Selection, mergekit: dict[str, MergekitForm], *more: Option
) -> Method:
    """A method that sums selected elements of task vectors."""
    return Method(
        help=help,
        why=why,
        example=example,
        panel=SUMS,
        mix=_mix_selected,
        base="required",
        models=(1, MANY),
        options=(WEIGHTS, DENSITY, NORMALIZE, SCALE, *more),
        granularity="tensor",
        selection=selection,
        check=(lambda request: _probabilities(selection, request)) if selection.by == "rank" else None,
        mergekit=mergekit,
    )


METHODS = {
    "task-arithmetic": Method(
        help="The base plus the weighted sum of the task vectors, times --scale.",
        why="adds weighted task vectors to the base",
        example="gemma2 merge task-arithmetic math code --base base --weights 0.5,0.4 --out merged",
        panel=SUMS,
        mix=_mix_task_arithmetic,
        base="required",
        models=(1, MANY),
        options=(WEIGHTS, NORMALIZE, SCALE),
        check=_sum_is_not_0,
        mergekit={"task_arithmetic": MergekitForm("required", WEIGHT, _summed(False))},
    ),
    "ties": _sum(
        "Task vectors trimmed to their largest elements; where signs conflict, those of the majority by mass are kept.",
        "adds trimmed task vectors where their signs agree",
        "gemma2 merge ties math code --base base --density 0.2 --out merged",
        Selection("magnitude", elect=True, density=0.2),
        {"ties": MergekitForm("required", SPARSE, _summed(True))},
    ),
    "dare": _sum(
        "Task vectors with elements dropped at random and the rest scaled up, summed.",
        "adds task vectors with elements dropped at random",
        "gemma2 merge dare math code --base base --density 0.5 --seed 1 --out merged",
        Selection("random", elect=False, density=0.5),
        {"dare_linear": MergekitForm("required", SPARSE, _summed(False) | RESCALED)},
        *MASKED,
    ),
    "dare-ties": _sum(
        "DARE's random dropping, then the signs as in TIES.",
        "drops elements at random, then elects signs",
        "gemma2 merge dare-ties math code --base base --density 0.5 --out merged",
        Selection("random", elect=True, density=0.5),
        {"dare_ties": MergekitForm("required", SPARSE, _summed(False) | RESCALED)},
        *MASKED,
    ),
    "della": _sum(
        "Random dropping that keeps large elements of a row more often, then the signs as in TIES.",
        "drops small elements more often, then elects signs",
        "gemma2 merge della math code --base base --density 0.5 --epsilon 0.1 --out merged",
        Selection("rank", elect=True, density=0.5, epsilon=0.1),
        {"della": MergekitForm("required", RANKED, _summed(True) | RESCALED)},
        EPSILON,
        *MASKED,
    ),
    "della-linear": _sum(
        "DELLA's dropping without the signs: a plain sum.",
        "drops small elements more often, then adds",
        "gemma2 merge della-linear math code --base base --density 0.5 --out merged",
        Selection("rank", elect=False, density=0.5, epsilon=0.1),
        {"della_linear": MergekitForm("required", RANKED, _summed(False) | RESCALED)},
        EPSILON,
        *MASKED,
    ),
    "breadcrumbs": _sum(
        "Task vectors without their largest and their smallest elements, summed.",
        "adds task vectors without their largest and smallest elements",
        "gemma2 merge breadcrumbs math code --base base --density 0.9 --gamma 0.01 --out merged",
        Selection("magnitude", elect=False, density=0.9, gamma=0.01),
        {"breadcrumbs": MergekitForm("required", OUTLIERS, _summed(False))},
        GAMMA,
    ),
    "breadcrumbs-ties": _sum(
        "Breadcrumbs, then the signs as in TIES.",
        "drops the largest and smallest elements, then elects signs",
        "gemma2 merge breadcrumbs-ties math code --base base --density 0.9 --gamma 0.01 --out merged",
        Selection("magnitude", elect=True, density=0.9, gamma=0.01),
        {"breadcrumbs_ties": MergekitForm("required", OUTLIERS, _summed(False))},
        GAMMA,
    ),
}
