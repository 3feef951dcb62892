"""The settings of merges that choose elements, and the table in which their kernels take them (see `sparse`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .number_formats import Doubles

__all__ = ["COLUMNS", "ELECT", "ELECT_MEAN", "SUM", "Sparsity"]

SUM, ELECT, ELECT_MEAN = 0, 1, 2
WEIGHT, SHARE, LOW, HIGH, KEEP, SPREAD, RESCALE, SCALE = range(8)  # columns of the table
COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """The settings of one tensor's merge in plain numbers; each tuple has one per model.

    weights    of the task vectors
    low, high  smallest and largest magnitude that is kept; () keeps all
    keep       DARE, DELLA: mean keep probability; () keeps all
    spread     DELLA: epsilon, half of the range of the keep probability; () is 0
    rescale    divide kept elements by their keep probability
    elect      take only terms of the elected sign
    normalize  divide by the sum of the weights: of all models, or with `elect` of those that take part
    scale      of the merged task vector (lambda)
    """

    weights: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    keep: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    rescale: bool = True
    elect: bool = False
    normalize: bool = False
    scale: float = 1.0

    @property
    def consensus(self) -> int:
        """SUM, ELECT or ELECT_MEAN."""
        return (ELECT_MEAN if self.normalize else ELECT) if self.elect else SUM

    @property
    def by_rows(self) -> bool:
        """Whether ranks within rows are needed: the unit of `sparse_combine` is then the row."""
        return any(self.spread)

    def table(self) -> Doubles:
        """Return the table for `sparse_combine`, (M, COLUMNS) fp64."""
        table = np.zeros((len(self.weights), COLUMNS))
        share = np.array(self.weights)
        table[:, WEIGHT] = share / share.sum() if self.normalize and not self.elect else share
        table[:, SHARE] = share
        table[:, SCALE] = self.scale  # after the election: rounding scale * weight to fp32 would break exact ties
        table[:, LOW] = self.low or 0.0
        table[:, HIGH] = self.high or np.inf
        table[:, KEEP] = self.keep or 1.0
        table[:, SPREAD] = self.spread or 0.0
        table[:, RESCALE] = self.rescale
        return table
