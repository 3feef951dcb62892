"""One merge method: its description, and the weights that it gives the operands. Numpy-free.

The operands of a merge are the base, where there is one, then the models in the caller's order. Reading, checking,
streaming, reporting, flags, file keys, pipeline stages and help pages are the same for all methods: see
docs/adding-a-merge-method.md.

A method that is neither one combination per group (`Method.mix`) nor a choice by magnitude or at random (`Selection`)
has `Elements`: functions that see pieces of whole rows as fp64 arrays, read no file and keep no state. `Fused` is the
same with compiled arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from gemma2.core.json_files import JsonMapping

from .option import Option, OptionValue
from .request import Granularity, MergeRequest, Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gemma2.merging.kernels.sparsity import Sparsity

    Array = NDArray[Any]
    Doubles = NDArray[np.float64]

__all__ = [
    "MANY",
    "Elements",
    "Fused",
    "Group",
    "MergekitForm",
    "Method",
    "Mix",
    "Piece",
    "Selection",
    "Term",
    "Total",
    "around_base",
]
__all__ += ["nothing", "of_ranks", "scores_of_ranks"]

MANY = 64  # models at most


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


def around_base(group: Group, coefficients: Doubles, fallback: str = "") -> Mix:
    """Coefficients of the vectors as weights of the operands; with a base they add up to 1 together with its own."""
    from .coefficients import warp_coefficients

    weights = warp_coefficients(coefficients, 1.0) if group.based else coefficients
    return Mix(weights[None, :], fallback)


@dataclass(frozen=True)
class Selection:
    """The way in which a method chooses elements of the task vectors and adds up the chosen ones.

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
        from gemma2.merging.kernels.sparsity import Sparsity  # its kernels, which a scalar combination need not load

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


Term = tuple[str, Any]  # one of our attributes, and mergekit's default of it; None: the file must give it


@dataclass(frozen=True)
class MergekitForm:
    """A method of mergekit that this method computes, in mergekit's terms.

    base       required, optional; input: a base_model is one more model; none: not taken
    per_model  parameters of a model: name -> our attribute and the default
    options    parameters of the merge: name -> our attribute and the default
    only       parameters that have one value here: name -> the value
    fixed      attributes of ours that make our method theirs
    """

    base: str
    per_model: Mapping[str, Term] = field(default_factory=dict)
    options: Mapping[str, Term] = field(default_factory=dict)
    only: JsonMapping = field(default_factory=dict)
    fixed: JsonMapping = field(default_factory=dict)


BITS = 16  # a pattern of 31 bits is counted by its upper and then by its lower bits


@dataclass(frozen=True)
class Piece:
    """Whole rows of one tensor in all operands.

    values   (operands, n) fp64, the base first where there is one
    columns  elements of a row; a vector is one row
    based    whether the first operand is the base
    flat     whether the tensor is a vector
    """

    values: Doubles
    columns: int
    based: bool
    flat: bool = False

    @cached_property
    def vectors(self) -> Doubles:
        """(models, n): task vectors where there is a base, else the weights."""
        return self.values[1:] - self.values[0] if self.based else self.values

    def rows(self, values: Doubles) -> Doubles:
        """An array (..., n) as (..., rows, columns)."""
        return values.reshape(*values.shape[:-1], -1, self.columns)


Total = Callable[[Callable[[Piece], "Array"]], "Array"]  # the sum of a function over all pieces of a group


@dataclass(frozen=True)
class Elements:
    """A method by elements.

    combine  (group, piece, what `look` found) -> the merged vector, (n,): added to the base where there is one
    look     (group, total) -> whatever `combine` needs from the whole group; `total(function)` reads all pieces once
             and adds up what the function returns for each, in the order of the file
    looks    how often `look` calls `total`, at most
    """

    combine: Callable[[Group, Piece, Any], Doubles]
    look: Callable[[Group, Total], Any]
    looks: int = 0


def nothing(group: Group, total: Total) -> None:
    """`look` of a method that needs nothing from the whole group."""


def of_ranks(score: Callable[[Piece], Doubles], ranks: Callable[[int], Sequence[int]], total: Total) -> list[float]:
    """The scores with these ranks among all of a group; rank 0 is the smallest, and a rank
    that no element has is infinite. Exact for fp32 scores of 0 or more.

    ranks  (number of elements) -> wanted ranks. Two totals: fp32 numbers order like their bits, which are counted by
           their upper half, then within the halves that hold the ranks.
    """
    import numpy as np

    def bits(piece: Piece) -> Array:
        return score(piece).astype(np.float32).view(np.uint32)

    def inside(piece: Piece, bins: Sequence[int]) -> Array:
        own, low = bits(piece), (1 << BITS) - 1
        return np.stack([np.bincount(own[own >> BITS == bin] & low, minlength=1 << BITS) for bin in bins])

    return scores_of_ranks(
        lambda: total(lambda piece: np.bincount(bits(piece) >> BITS, minlength=1 << BITS)),
        lambda bins: total(lambda piece: inside(piece, bins)),
        ranks,
    )


def scores_of_ranks(
    upper: Callable[[], Array], lower: Callable[[Sequence[int]], Array], ranks: Callable[[int], Sequence[int]]
) -> list[float]:
    """`of_ranks` from counts of the scores' bits.

    upper  how many scores have each upper half of bits, (1 << BITS,)
    lower  (upper halves) -> how many scores with this upper half have each lower half, (B, 1 << BITS)
    """
    import numpy as np

    counts = upper()
    ends = np.cumsum(counts)
    wanted = ranks(int(ends[-1]))
    if not ends[-1]:
        return [np.inf for _ in wanted]
    bins = [int(np.searchsorted(ends, rank, side="right")) for rank in wanted]  # 1 << BITS if none
    found = []
    for rank, bin, row in zip(wanted, bins, np.cumsum(lower(bins), axis=1), strict=True):
        if bin == 1 << BITS:
            found.append(np.inf)
            continue
        before = int(ends[bin] - counts[bin])
        pattern = bin << BITS | int(np.searchsorted(row, rank - before, side="right"))
        found.append(float(np.array([pattern], np.uint32).view(np.float32)[0]))
    return found


@dataclass(frozen=True)
class Fused:
    """A method by elements whose arithmetic is compiled: see `merging/kernels/elements.py` for kinds and numbers.

    kind     the arithmetic
    first    (group) -> the first number, where no rank decides it
    ranks    (group, number of elements) -> ranks of scores, 0 the smallest; none: scores are not counted
    limit    the scores with these ranks -> the first number
    weights  (group, sums of the models (M, 2)) -> one number for each; None: 1, and no sums are needed
    looks    passes before the one that writes, at most
    """

    kind: Literal["sce", "ram", "nearswap", "arcee"]
    first: Callable[[Group], float]
    ranks: Callable[[Group, int], Sequence[int]] | None = None
    limit: Callable[[Sequence[float]], float] = max
    weights: Callable[[Group, Doubles], Doubles] | None = None
    looks: int = 0


@dataclass(frozen=True, kw_only=True)
class Method:
    """One merge method.

    help         its page and its line in the list of methods
    why          what a stage with it does, in a report: "averages weights"
    example      a command line
    panel        heading under which the list of methods shows it
    mix          (group, Gram matrix of its vectors (M, M) float64) -> Mix. The vectors are task vectors where there is
                 a base, else the weights
    adaptive     whether mix looks at the Gram matrix: the data is then read twice
    base         required: the user names it; sought: or it is the parent that all models record; optional: or there is
                 none and the weights themselves are merged; given: only one that is named counts; none: not taken
    models       smallest and largest number of models
    options      that it reads, besides those of all methods
    defaults     of its options, by name, where they are not those of all methods: shown on its page
    filled       options that a request without them gets and that its manifest records, by attribute
    one_of       names of options of which a command line or a stage gives exactly one
    check        raises UsageError for numbers that do not fit each other
    granularity  its own
    selection    of elements by magnitude or at random; None for other methods
    elements     the result element by element, as functions on numpy arrays; None for other methods
    fused        the same by compiled passes; None for other methods
    mergekit     mergekit's names of it
    """

    help: str
    why: str
    example: str
    panel: str
    mix: Callable[[Group, Doubles], Mix]
    base: Literal["required", "sought", "optional", "given", "none"]
    models: tuple[int, int]
    adaptive: bool = False
    options: tuple[Option, ...] = ()
    defaults: Mapping[str, float] = field(default_factory=dict)
    filled: Mapping[str, OptionValue] = field(default_factory=dict)
    one_of: tuple[str, ...] = ()
    check: Callable[[MergeRequest], None] | None = None
    granularity: Granularity = "layer"
    selection: Selection | None = None
    elements: Elements | None = None
    fused: Fused | None = None
    mergekit: Mapping[str, MergekitForm] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """The number of times that the data is read."""
        by_elements = self.elements or self.fused
        if by_elements is not None:
            return 1 + by_elements.looks
        thresholds = self.selection is not None and self.selection.by == "magnitude"
        return 2 if self.adaptive or thresholds else 1

    def default(self, option: Option) -> str:
        """The default of an option as its page shows it."""
        value = self.defaults.get(option.name)
        if value is None and self.selection is not None:
            value = {"density": self.selection.density, "gamma": self.selection.gamma}.get(option.name)
            value = self.selection.epsilon if option.name == "epsilon" else value
        return option.shown if value is None else f"{value:g}"
