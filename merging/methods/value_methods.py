"""Methods by elements: SCE, RAM and RAM+, nearswap, Arcee Fusion, and NuSLERP of single rows or columns.

With task vectors d_m = model_m - base, per tensor unless another granularity is chosen:

SCE        FuseChat, arXiv 2408.07990, section 3.3. Select: positions outside the share `select` with the highest
           variance over the models are 0. Calculate: w_m = mean(d_m^2) / sum_m mean(d_m^2). Erase: where the sign of
           an element is not that of the sum of all, its term is dropped. Result: sum of w_m d_m over what is left,
           divided by the sum of its w_m
RAM        arXiv 2601.13572, section 4. An element counts as changed where |d| > threshold. Changed in several models:
           their mean. Changed in one: that one, with RAM+ times 1 + boost * min(rho, cap), where rho is the ratio of
           the elements of that model that others changed too to those that it alone changed
nearswap   described with the model QuartetAnemoi-70B: base + w d with w = min(1, reach / |d|), that is d cut to
           -reach .. reach
Arcee      described with mergekit 0.1: elements whose importance |d| * KL is above median + 1.5 (Q3 - Q1) are those of
Fusion     the model, all others those of the base; KL is the divergence of the softmax of a row of the model from that
           of the base. A quantile is the element at floor(q (n - 1)), counted from the smallest
NuSLERP    by rows or columns: one angle for each, see `spherical.nuslerp`

Deviations: 1) SCE: elements equal to the threshold are all kept, as in TIES. 2) NuSLERP: a zero row, or rows at less
than 0.06 degrees, are interpolated linearly (the limit); rows that point opposite to each other too, since there is no
way to choose between the arcs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma2.core.errors import UsageError

from .method import MANY, Elements, Fused, Group, MergekitForm, Method, Mix, Piece, Term, Total
from .option import WEIGHTS, define
from .request import MergeRequest

if TYPE_CHECKING:
    from .method import Doubles

__all__ = ["METHODS"]

SELECT = define(
    name="select", help="share of the positions, by variance over the models, that takes part",
    varies=True, low=0, high=1, shown="1",
)  # fmt: skip
THRESHOLD = define(
    name="threshold", help="an element above this size counts as changed", varies=True, low=0, shown="1e-05"
)
BOOST = define(name="boost", help="weight of the overlap in the factor of a model's own elements", varies=True, low=0)
CAP = define(name="cap", help="largest overlap that counts", varies=True, low=0)
REACH = define(name="reach", help="largest change of an element", varies=True, low=0)
COLUMNS = define(name="columns", kind="switch", help="one angle per column instead of per row")

SUMS, TWO = "Sums of task vectors", "Two models"
RAM_BOOST, RAM_CAP = 0.1, 0.2
CHANGED: dict[str, Term] = {"epsilon": ("threshold", 1e-5)}
BY_ROWS = {"weight": ("weights", None)}


def _mix_equal(group: Group, gram: Doubles) -> Mix:
    """For the report alone: the result is not one combination of the models."""
    import numpy as np

    return Mix(np.full((1, group.models), 1.0 / group.models))


# --- numbers of the compiled methods ---


def _ranks_sce(group: Group, count: int) -> Sequence[int]:
    """The rank of the smallest variance that is selected."""
    share = 1.0 if group.settings.select is None else group.settings.select
    return [count - int(share * count + 1e-6)] if share < 1.0 else []


def _weights_sce(group: Group, sums: Doubles) -> Doubles:
    """The shares of the models in the squared norm of what is selected."""
    energy: Doubles = sums[:, 0] / (sums[:, 0].sum() or 1.0)
    return energy


def _threshold(group: Group) -> float:
    return 1e-5 if group.settings.threshold is None else float(group.settings.threshold)


def _factors_ram_plus(group: Group, sums: Doubles) -> Doubles:
    """The factor of what each model alone changed, from the elements that it changed with others and alone."""
    import numpy as np

    shared, own = sums.T
    given = group.settings
    boost = RAM_BOOST if given.boost is None else given.boost
    cap = RAM_CAP if given.cap is None else given.cap
    overlap = np.divide(shared, own, out=np.full(len(own), np.inf), where=own > 0)
    factors: Doubles = 1.0 + boost * np.minimum(overlap, cap)
    return factors


def _needs_reach(request: MergeRequest) -> None:
    if request.reach is None:
        raise UsageError("merge nearswap needs --reach", "give the largest change of an element, like 0.0001")


def _quartiles(group: Group, count: int) -> Sequence[int]:
    return [(count - 1) * quarter // 4 for quarter in (1, 2, 3)]


def _outlier(quartiles: Sequence[float]) -> float:
    """Scores above it are those of outliers."""
    first, median, third = quartiles
    return median + 1.5 * (third - first)


# --- NuSLERP of rows ---


def _products(piece: Piece, axis: int) -> Doubles:
    """<u, u>, <v, v>, <u, v> of the rows (axis -1) or columns (-2) of two matrices."""
    import numpy as np

    first, second = piece.rows(piece.vectors)
    return np.stack([(first * first).sum(axis), (second * second).sum(axis), (first * second).sum(axis)])


def _look_rows(group: Group, total: Total) -> Doubles | None:
    """The products of the columns, which the rows of all pieces add up to; a vector is one row."""
    if not group.settings.columns:
        return None
    return total(lambda piece: _products(piece, -2))


def _combine_rows(group: Group, piece: Piece, found: Doubles | None) -> Doubles:
    import numpy as np

    from .coefficients import SMALLEST_ANGLE
    from .spherical import shares

    first, second = piece.rows(piece.vectors)
    t = float(shares(2, group.settings.weights)[1])
    products = _products(piece, -1)[..., None] if found is None or piece.flat else found[:, None, :]
    lengths = np.sqrt(products[0]) * np.sqrt(products[1])
    cosine = np.divide(products[2], lengths, out=np.ones_like(lengths), where=lengths > 0)
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    plain = (angle < SMALLEST_ANGLE) | (angle > np.pi - SMALLEST_ANGLE)
    sine = np.where(plain, 1.0, np.sin(angle))
    left = np.where(plain, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    right = np.where(plain, t, np.sin(t * angle) / sine)
    merged: Doubles = (left * first + right * second).reshape(-1)
    return merged


def _columns_of_one_tensor(request: MergeRequest) -> None:
    if request.columns and request.granularity not in (None, "tensor"):
        raise UsageError(f"--columns does not go with --granularity {request.granularity}", "leave --granularity out")


def _by_elements(**entry: Any) -> Method:  # noqa: ANN401
    """A method by elements: per tensor, of task vectors."""
    return Method(**{"mix": _mix_equal, "granularity": "tensor", "base": "required", **entry})


METHODS = {
    "sce": _by_elements(
        fused=Fused("sce", lambda group: -1.0, _ranks_sce, weights=_weights_sce, looks=3),
        help="Task vectors weighted by their energy per tensor, without elements against the majority's sign; --select "
        "keeps the positions with the highest variance alone.",
        why="adds task vectors by their energy where their signs agree",
        example="gemma2 merge sce math code --base base --select 0.1 --out merged",
        panel=SUMS,
        models=(2, MANY),
        options=(SELECT,),
        mergekit={"sce": MergekitForm("required", options={"select_topk": ("select", 1.0)})},
    ),
    "ram": _by_elements(
        fused=Fused("ram", _threshold),
        help="Task vectors of RL runs: the mean of the models that changed an element, so that what one model alone "
        "changed stays whole.",
        why="averages task vectors over the models that changed an element",
        example="gemma2 merge ram rl-1 rl-2 --base sft --out merged",
        panel=SUMS,
        models=(2, MANY),
        options=(THRESHOLD,),
        mergekit={"ram": MergekitForm("required", options=CHANGED)},
    ),
    "ram-plus": _by_elements(
        fused=Fused("ram", _threshold, weights=_factors_ram_plus, looks=1),
        help="RAM, with what one model alone changed scaled up by its overlap with the others.",
        why="averages task vectors over the models that changed an element, and scales up what one alone changed",
        example="gemma2 merge ram-plus rl-1 rl-2 --base sft --boost 0.1 --cap 0.2 --out merged",
        panel=SUMS,
        models=(2, MANY),
        options=(THRESHOLD, BOOST, CAP),
        defaults={"boost": RAM_BOOST, "cap": RAM_CAP},
        mergekit={
            "ramplus_tl": MergekitForm(
                "required", options=CHANGED | {"r": ("boost", RAM_BOOST), "alpha": ("cap", RAM_CAP)}
            )
        },
    ),
    "nearswap": _by_elements(
        fused=Fused("nearswap", lambda group: float(group.settings.reach)),
        help="The base, each element moved towards the model by at most --reach.",
        why="moves each element of the base towards a model by a limited amount",
        example="gemma2 merge nearswap model --base base --reach 0.0001 --out merged",
        panel=TWO,
        models=(1, 1),
        options=(REACH,),
        check=_needs_reach,
        mergekit={"nearswap": MergekitForm("required", options={"t": ("reach", None)})},
    ),
    "arcee-fusion": _by_elements(
        fused=Fused("arcee", lambda group: 0.0, _quartiles, _outlier, looks=2),
        help="The base with the most important elements of a model: outliers of change times divergence of its row.",
        why="takes the elements of a model whose change is an outlier",
        example="gemma2 merge arcee-fusion model --base base --out merged",
        panel=TWO,
        models=(1, 1),
        mergekit={"arcee_fusion": MergekitForm("required")},
    ),
    "nuslerp-rows": _by_elements(
        elements=Elements(_combine_rows, _look_rows, looks=1),
        help="NuSLERP with one angle for each row of a matrix, or for each column.",
        why="SLERP of two models by relative weights, row by row",
        example="gemma2 merge nuslerp-rows a b --weights 1,3 --base base --out merged",
        panel="Averages on a sphere",
        base="given",
        models=(2, 2),
        options=(WEIGHTS, COLUMNS),
        check=_columns_of_one_tensor,
        mergekit={
            "nuslerp with nuslerp_flatten: false": MergekitForm(
                "optional", BY_ROWS, {"nuslerp_row_wise": ("columns", False)}
            )
        },
    ),
}
