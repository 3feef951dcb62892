"""Heat maps of merges over layers: the angle between task vectors, and the share of their length that a merge keeps.

A map has one hue from light to dark, so that order survives in print and for colour-blind readers. A cell is one group
(a layer) of one merge; the value is written in it if there is room, and always in its tool tip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .figures import MUTED, PAPER, SHADES, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ANGLES", "KEPT", "MapOf", "layer_map"]

WRITTEN = 14  # most columns with which a cell has room for its value
Cells = Mapping[str, Mapping[str, float | None]]  # row (a merge) -> column (a group) -> value


@dataclass(frozen=True)
class MapOf:
    """The scale of a map: values of the lightest and the darkest shade, and the text of a value in a cell and a tip."""

    lightest: float
    darkest: float
    short: Callable[[float], str]
    long: Callable[[float], str]
    nothing: str


ANGLES = MapOf(0.0, 120.0, lambda value: f"{value:.0f}°", lambda value: f"{value:.1f} degrees", "no angle")
# From half of the length to a little more than all: LERP of orthogonal task vectors keeps 71 %, SLERP 100 %.
KEPT = MapOf(0.5, 1.15, lambda value: f"{100 * value:.0f}", lambda value: f"{100 * value:.1f} % kept", "no length")


def layer_map(
    cells: Cells, of: MapOf, narrow: bool = False, tips: Mapping[tuple[str, str], str] | None = None
) -> Figure:
    """The map: merges as rows and groups as columns, in the narrow form the other way round.

    A cell with the value None has no colour. tips: (merge, group) -> text added to the tool tip.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    names = list(cells)
    groups = list(dict.fromkeys(group for row in cells.values() for group in row))
    across, down = (names, groups) if narrow else (groups, names)
    with styled():
        size = (4.0, 1.1 + 0.27 * len(down)) if narrow else (7.6, 0.9 + 0.42 * len(down))
        figure, (axis,) = new_figure(*size)
        colours = LinearSegmentedColormap.from_list("shades", SHADES)
        for x, first in enumerate(across):
            for y, second in enumerate(down):
                name, group = (first, second) if narrow else (second, first)
                value = cells[name].get(group)
                shade = 0.0 if value is None else (value - of.lightest) / (of.darkest - of.lightest)
                shade = min(1.0, max(0.0, shade))
                cell = Rectangle((x, y), 1, 1, fc=PAPER if value is None else colours(shade), ec=PAPER, lw=1.5)
                more = (tips or {}).get((name, group), "")
                written = of.nothing if value is None else of.long(value)
                cell.set_gid(f"tip:{name}, {group}: {written}{f', {more}' if more else ''}")
                axis.add_patch(cell)
                if len(across) <= WRITTEN:
                    text = "-" if value is None else of.short(value)
                    colour = MUTED if value is None else ("#fffffe" if shade > 0.45 else "#000001")
                    axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8.5, color=colour)
        finish(axis, across, down)
        (axis.set_ylabel if narrow else axis.set_xlabel)("layer", fontsize=8.5)
        return figure


def finish(axis: Axes, across: Sequence[str], down: Sequence[str]) -> None:
    """Put names along both sides and the first row on top, without a frame; long names get two lines."""
    axis.set_xlim(0, len(across))
    axis.set_ylim(len(down), 0)
    size = 7.5 if len(across) > WRITTEN else 8.5
    names = [name.replace(" ", "\n", 1) for name in across]
    axis.set_xticks([i + 0.5 for i in range(len(across))], names, fontsize=size)
    axis.set_yticks([i + 0.5 for i in range(len(down))], down, fontsize=8.5)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
