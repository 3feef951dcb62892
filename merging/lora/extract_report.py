"""The report of an extraction: rank and error of each tensor and each layer, and what the adapter holds otherwise.

norm       |D|, D = W - W_base
error      |D - stored D| / |D|, in [0, 1]; of what is stored whole 0, of what is left out 1
explained  1 - error^2: the share of the squared norm that the adapter holds
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, sqrt

from gemma2.core.json_files import JsonObject
from gemma2.merging.inspect.distances import Sums
from gemma2.merging.plan.merge_plan import group_of

from .factorise import Svd

__all__ = ["Extracted", "report_of"]


@dataclass(frozen=True)
class Extracted:
    """A tensor that has factors. residual: |D - B A|^2 with the factors as they are stored."""

    name: str
    shape: tuple[int, ...]
    rank: int
    svd: Svd
    residual: float

    @property
    def parameters(self) -> int:
        """The number of elements of the two factors."""
        return self.rank * sum(self.shape)


def report_of(
    sums: Mapping[str, Sums],
    found: Sequence[Extracted],
    whole: Sequence[str],
    left_out: Sequence[str],
) -> JsonObject:
    """Return the summary that manifest and `--json` hold."""
    squares = {name: one.squares[2] for name, one in sums.items()}
    residuals = {one.name: one.residual for one in found} | {name: squares[name] for name in left_out}
    ranks = {one.name: one.rank for one in found}
    members: dict[str, list[str]] = {}
    for name in sums:
        members.setdefault(group_of(name), []).append(name)
    total = fsum(squares.values())
    lost = fsum(residuals.values())
    kinds = Counter(one.svd for one in found)
    return {
        "parameters": sum(one.parameters for one in found) + sum(sums[name].parameters for name in whole),
        "adapted": len(found),
        "stored_whole": len(whole),
        "left_out": len(left_out),
        "largest_rank": max(ranks.values(), default=0),
        "norm": sqrt(total),
        "error": _share(lost, total),
        "explained": 1 - lost / total,
        "error_of_weights": _share(lost, fsum(one.squares[1] for one in sums.values())),
        "svd": ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())) or "-",
        "groups": [_group(group, names, squares, residuals, ranks) for group, names in members.items()],
        "tensors": [
            {
                "tensor": one.name,
                "rank": one.rank,
                "svd": one.svd,
                "norm": sqrt(squares[one.name]),
                "error": _share(one.residual, squares[one.name]),
            }
            for one in found
        ],
        "whole": list(whole),
        "missing": [{"tensor": name, "norm": sqrt(squares[name]), "share": squares[name] / total} for name in left_out],
        "warnings": _warnings(squares, left_out, lost, total),
    }


def _group(
    group: str,
    names: Sequence[str],
    squares: Mapping[str, float],
    residuals: Mapping[str, float],
    ranks: Mapping[str, int],
) -> JsonObject:
    """Return the row of one layer."""
    own, lost = fsum(squares[name] for name in names), fsum(residuals.get(name, 0.0) for name in names)
    return {
        "group": group,
        "adapted": sum(name in ranks for name in names),
        "rank": max((ranks[name] for name in names if name in ranks), default=0),
        "norm": sqrt(own),
        "error": _share(lost, own),
        "explained": 1 - lost / own if own else 1.0,
    }


def _share(part: float, whole: float) -> float:
    """Return sqrt(part / whole); 0 of nothing."""
    return sqrt(part / whole) if whole else 0.0


def _warnings(squares: Mapping[str, float], left_out: Sequence[str], lost: float, total: float) -> list[str]:
    lines = []
    if left_out:
        share = fsum(squares[name] for name in left_out) / total
        lines.append(f"{len(left_out)} tensors that differ are left out, {left_out[0]} for one: {share:.2g} of it all")
    if lost > total / 2:
        lines.append(f"the adapter holds {1 - lost / total:.2g} of the squared difference: give a higher --rank")
    return lines
