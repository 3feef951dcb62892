"""Options of merge methods. Numpy-free: help pages and schemas read this table.

One entry is the flag of `gemma2 merge METHOD`, the key of a merge file and of a pipeline stage, the field of
`MergeRequest`, the number that `mix` reads, and its check. A method that needs another option calls `define`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .parameters import Number

__all__ = ["OPTIONS", "Option", "OptionValue", "define"]

OptionValue = Number | tuple[Number, ...] | None  # a switch is a bool and a count an int: both are floats to a checker


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of merge methods.

    name      of the flag and of the key
    help      one line: the meaning and the unit; a default follows from `shown` or from the method
    kind      number, integer or switch
    per       "": one value. model: one for all models, or one for each. output: one output for each
    varies    may differ between tensors: a gradient over the layers, or rules by name
    low, high smallest and largest value; None: no bound. open_low: `low` itself is refused
    shown     the default that the help page shows; "" where the method states it or none exists
    initial   value of a request that does not give it
    field     attribute of MergeRequest and Settings; the name where ""
    recorded  whether a manifest keeps it
    """

    name: str
    help: str
    kind: Literal["number", "integer", "switch"] = "number"
    per: Literal["", "model", "output"] = ""
    varies: bool = False
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    shown: str = ""
    initial: OptionValue = None
    field: str = ""
    recorded: bool = True

    @property
    def attribute(self) -> str:
        """Its name in MergeRequest and Settings."""
        return self.field or self.name

    @property
    def range(self) -> str:
        """The allowed values, for a message: "between 0 and 1"; "" where any finite number is allowed."""
        if self.low is not None and self.high is not None:
            return f"between {self.low:g} and {self.high:g}"
        return "" if self.low is None else f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"

    def allows(self, value: float) -> bool:
        """Whether a value is finite and within the bounds."""
        low = self.low is None or value > self.low or (value == self.low and not self.open_low)
        return abs(value) < float("inf") and low and (self.high is None or value <= self.high)


OPTIONS: dict[str, Option] = {}


def define(**fields: object) -> Option:
    """A new option, entered in OPTIONS. Raises ValueError for a name that is taken: reuse that option instead."""
    option = Option(**fields)  # type: ignore[arg-type]
    if option.name in OPTIONS:
        raise ValueError(f"the option {option.name} exists already: import it")
    OPTIONS[option.name] = option
    return option


# In the order in which manifests record them.
T = define(name="t", help="share of the second of two models", varies=True, low=0, high=1, shown="0.5")
ETA = define(
    name="eta", field="etas", help="share of the merged model; several give one OUT/eta-... each",
    per="output", varies=True, low=0, high=1, initial=(),
)  # fmt: skip
WEIGHTS = define(name="weights", help="one weight per model", per="model", varies=True, shown="equal")
DECAY = define(name="decay", help="share of the running average that each checkpoint keeps", low=0, high=1)
SCALE = define(name="scale", help="factor of the result", varies=True, shown="1")
DENSITY = define(name="density", help="share of elements that is kept", per="model", varies=True, low=0, high=1)
GAMMA = define(
    name="gamma", help="share of the largest elements that is dropped", per="model", varies=True, low=0, high=1
)
EPSILON = define(
    name="epsilon", help="half the spread of the keep probability over ranks", per="model", varies=True, low=0, high=1
)
NORMALIZE = define(name="normalize", kind="switch", help="divide by the sum of the weights that take part")
RESCALE = define(name="rescale", kind="switch", help="divide what is kept by its keep probability", shown="yes")
SEED = define(name="seed", kind="integer", help="seed of the random masks", low=0, shown="0", initial=0)
ITERATIONS = define(name="iterations", kind="integer", help="maximum iterations of the mean", low=0)
TOLERANCE = define(name="tolerance", help="radians; the iteration ends at a shorter step", low=0, open_low=True)
UNIFORM = define(name="uniform", kind="switch", help="plain average of the checkpoints", initial=False, recorded=False)
