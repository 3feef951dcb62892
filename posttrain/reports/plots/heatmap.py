"""Heat map of the difference between two models: kinds of tensors as rows, layers as columns, the rest at the side.

One panel shows the relative difference |b - a| / |a| (blue); with a base, a second shows the angle between the task
vectors (orange). Each panel has one hue from light to dark, so that order survives in print and for colour-blind
readers. The scale is logarithmic if the values span more than a factor of 30. In an SVG, cells have tool tips.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma2.core.errors import OutputError, UsageError
from gemma2.core.outputs.safetensors_header import printable
from gemma2.merging.inspect.difference import Difference, ModelDifference
from gemma2.merging.plan.merge_plan import group_of

from .figures import GRID, INK, MUTED, PAPER, SHADES, styled, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

__all__ = ["check_plot", "heat_map", "write_heat_map"]

Rgba = tuple[float, float, float, float]

EMBERS = ("#fdf6ef", "#f7c79b", "#e08a3c", "#a3480a", "#4a1c02")
LAYER = re.compile(r"(?:layers|layer|h|blocks)\.(\d+)$")
# Kinds in the order of a forward pass; others follow by name.
ORDER = (
    *("qkv_proj", "q_proj", "q_norm", "k_proj", "k_norm", "v_proj", "o_proj"),
    *("gate_up_proj", "gate_proj", "up_proj", "down_proj"),
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
ROW, LETTER = 0.25, 0.073  # inches: height of a cell, width of a letter of 8.5 points
ACROSS, NARROWEST, WIDEST = 6.5, 0.11, 0.62  # inches: all layers of a deep model, and the limits of one cell
READABLE = 0.42  # inches; wider cells have room for their values
SPAN = 30.0  # largest over smallest value; beyond this ratio the scale is logarithmic


@dataclass(frozen=True)
class Grid:
    """Cells by (kind, layer), and for tensors outside the layers by name."""

    kinds: Sequence[str]
    layers: Sequence[int]
    cells: Mapping[tuple[str, int], Difference]
    others: Mapping[str, Difference]

    @property
    def everything(self) -> list[Difference]:
        """All cells."""
        return [*self.cells.values(), *self.others.values()]


@dataclass(frozen=True)
class Panel:
    """The content of a panel: the value that a cell's colour shows, and how it is written."""

    title: str
    shades: Sequence[str]
    value: Callable[[Difference], float | None]
    text: Callable[[float], str]
    blank: str  # meaning of a cell without colour


def _percent(value: float) -> str:
    """Two significant digits in a unit that needs no power of ten: 12 %, 1.2 %, 0.012 %, 1.2 ppm, 0.0012 ppm."""
    share, unit = (100 * value, "%") if value >= 9.95e-6 or value == 0 else (1e6 * value, "ppm")
    if share >= 9.95 or share == 0:
        return f"{share:.0f} {unit}"
    return f"{share:.{1 - math.floor(math.log10(share))}f}".rstrip("0").rstrip(".") + f" {unit}"


def _apart(cell: Difference) -> str:
    """The relative difference as text."""
    return "a is zero" if cell.relative is None else f"{_percent(cell.relative)} of |a|"


RELATIVE = Panel(
    "Relative difference  |b − a| / |a|",
    SHADES,
    lambda cell: cell.relative or None,
    _percent,
    "white: identical",
)
ANGLE = Panel(
    "Angle between the task vectors",
    EMBERS,
    lambda cell: cell.task_angle,
    lambda value: f"{value:.0f}°",
    "white: no task vector",
)


# --- what is in a cell ----------------------------------------------------------------------------------------------


def grid_of(difference: ModelDifference) -> Grid:
    """Sort the tensors of a comparison by kind and layer; experts of one layer share a cell."""
    inside: dict[tuple[str, int], list[str]] = {}
    outside: dict[str, list[str]] = {}
    for name in difference.sums:
        group = group_of(name)
        layer = LAYER.search(group)
        if layer is None:
            outside.setdefault(group.rsplit(".", 1)[-1], []).append(name)
        else:
            rest = name.split(f"{group}.", 1)[1].removesuffix(".weight")
            inside.setdefault((re.sub(r"\.\d+(?=\.)", ".*", rest), int(layer[1])), []).append(name)
    short = _short({kind for kind, _ in inside})
    cells = {
        (short[kind], layer): difference.over(f"layer {layer}, {short[kind]}", names)
        for (kind, layer), names in inside.items()
    }
    return Grid(
        kinds=sorted({kind for kind, _ in cells}, key=_place),
        layers=sorted({layer for _, layer in cells}),
        cells=cells,
        others={printable(name): difference.over(name, names) for name, names in outside.items()},
    )


def _short(kinds: set[str]) -> dict[str, str]:
    """Short names of kinds: `q_proj` for `self_attn.q_proj`, unless another kind has the same last part."""
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return {kind: printable(tail if last.count(tail) == 1 else kind) for kind, tail in zip(kinds, last, strict=True)}


def _place(kind: str) -> tuple[int, str]:
    return (ORDER.index(kind) if kind in ORDER else len(ORDER), kind)


# --- drawing --------------------------------------------------------------------------------------------------------


def heat_map(difference: ModelDifference) -> Figure:
    """The figure of a comparison, with a second panel if it has a base."""
    grid = grid_of(difference)
    panels = [RELATIVE, *([ANGLE] if difference.base else [])]
    with styled():
        page = _Page(grid, len(panels))
        page.heading(difference)
        for number, panel in enumerate(panels):
            page.draw(panel, number)
        return page.figure


class _Page:
    """The figure, from left to right: names, cells of the layers, cells of other tensors, colour bar.

    Positions are in inches from the upper left corner.
    """

    def __init__(self, grid: Grid, panels: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.grid = grid
        self.cell = min(max(ACROSS / max(len(grid.layers), 1), NARROWEST), WIDEST)
        self.left = 0.3 + LETTER * max((len(_label(kind)) for kind in grid.kinds), default=0)
        self.side = self.left + self.cell * len(grid.layers) + (0.35 if grid.layers else 0)
        self.side_cell = max(self.cell, READABLE + 0.1)
        self.bar = self.side + 0.3
        if grid.others:
            self.bar += self.side_cell + LETTER * max(len(name) for name in grid.others) + 0.1
        self.rows = max(len(grid.kinds), len(grid.others), 5)
        self.width = max(self.bar + 0.85, 5.2)
        self.panel_height = self.rows * ROW + 0.95
        self.height = 0.55 + panels * self.panel_height
        self.figure = Figure(figsize=(self.width, self.height), facecolor=PAPER)
        FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes of that size whose upper left corner is at (x, y)."""
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(
        self, x: float, y: float, text: str, size: float, colour: str = MUTED, weight: str = "normal", end: str = "left"
    ) -> None:
        """Write text of `size` points; (x, y) is the middle of its left or right end."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            ha=end,
            va="center",
            fontsize=size,
            color=colour,
            fontweight=weight,
        )

    def heading(self, difference: ModelDifference) -> None:
        """Write the names of the models and the total difference."""
        total = difference.total
        names = [printable(path.resolve().name) for path in (difference.a, difference.b)]
        facts = [f"|b − a| is {_percent(total.relative)} of |a|" if total.relative is not None else "a is zero"]
        if difference.base and total.task_angle is not None:
            base = printable(difference.base.resolve().name)
            facts.append(f"task vectors from {base} are {total.task_angle:.0f}° apart")
        self.text(0.15, 0.22, f"a = {names[0]},  b = {names[1]}", 11, INK, "bold")
        self.text(0.15, 0.45, ", ".join(facts), 8.5)

    def draw(self, panel: Panel, number: int) -> None:
        """Draw a panel: title, cells, colour bar, and the meaning of blank cells."""
        top = 0.55 + number * self.panel_height + 0.62
        colour = _colours(panel, [panel.value(cell) for cell in self.grid.everything])
        self.text(0.15, top - 0.36, panel.title, 9.5, INK)
        if self.grid.layers:
            self._layers(panel, colour, top)
        if self.grid.others:
            self._others(panel, colour, top)
        height = self.rows * ROW
        if colour is not None:
            self._bar(panel, colour, self.axes(self.bar, top, 0.13, height))
        blank = {_face(panel, cell, colour) for cell in self.grid.everything if panel.value(cell) is None}
        notes = [note for face, note in ((PAPER, panel.blank), (GRID, "grey: a is zero, b is not")) if face in blank]
        self.text(self.left, top + height + 0.14, ", ".join(notes), 7.5)

    def _layers(self, panel: Panel, colour: ScalarMappable | None, top: float) -> None:
        kinds, layers = self.grid.kinds, self.grid.layers
        axis = self.axes(self.left, top, self.cell * len(layers), ROW * len(kinds))
        for y, kind in enumerate(kinds):
            for x, layer in enumerate(layers):
                if (kind, layer) in self.grid.cells:
                    _draw_cell(axis, (x, y), self.grid.cells[kind, layer], panel, colour, self.cell >= READABLE)
        _frame(axis, len(layers), len(kinds))
        step = next(step for step in (1, 2, 5, 10, 20) if step * self.cell >= 0.21)
        shown = [(x + 0.5, str(layer)) for x, layer in enumerate(layers) if layer % step == 0]
        axis.set_xticks([x for x, _ in shown], [text for _, text in shown], fontsize=7.5)
        axis.set_yticks([y + 0.5 for y in range(len(kinds))], [_label(kind) for kind in kinds], fontsize=8.5)
        self.text(self.left - 0.09, top - 0.11, "layer", 7.5, end="right")

    def _others(self, panel: Panel, colour: ScalarMappable | None, top: float) -> None:
        names = list(self.grid.others)
        axis = self.axes(self.side, top, self.side_cell, ROW * len(names))
        for y, name in enumerate(names):
            _draw_cell(axis, (0, y), self.grid.others[name], panel, colour, True)
        _frame(axis, 1, len(names))
        axis.yaxis.tick_right()
        axis.tick_params(length=0)
        axis.set_yticks([y + 0.5 for y in range(len(names))], names, fontsize=8.5)
        axis.set_xticks([])

    def _bar(self, panel: Panel, colour: ScalarMappable, axis: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, NullLocator

        bar = self.figure.colorbar(colour, cax=axis)
        bar.outline.set_visible(False)
        axis.grid(visible=False)
        axis.tick_params(length=0, labelsize=7.5)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.text(value)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_yticks(list(_ticks(*colour.get_clim())))


def _label(kind: str) -> str:
    return kind.replace("layernorm", "norm")


def _colours(panel: Panel, values: Sequence[float | None]) -> ScalarMappable | None:
    """The colour scale over the values, or None without any."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    found = [value for value in values if value is not None]
    if not found:
        return None
    low, high = min(found), max(found)
    logarithmic = panel is RELATIVE and high > SPAN * low
    if not logarithmic:
        # Widen the scale, so that nearly equal values do not get very different colours.
        low, high = (0.0, high) if panel is RELATIVE else (max(low - 5, 0.0), min(high + 5, 180.0))
    norm = (LogNorm if logarithmic else Normalize)(low, high if high > low else low + 1)
    return ScalarMappable(norm, LinearSegmentedColormap.from_list("shades", list(panel.shades)))


def _ticks(low: float, high: float) -> Iterator[float]:
    """Tick values of a colour bar: 1 and 3 times powers of ten on a logarithmic scale, else about five values."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    wide = low > 0 and high > SPAN * low
    places = LogLocator(subs=(1.0, 3.0)).tick_values(low, high) if wide else MaxNLocator(5).tick_values(low, high)
    yield from (place for place in places if low <= place <= high)


def _draw_cell(
    axis: Axes, place: tuple[int, int], cell: Difference, panel: Panel, colour: ScalarMappable | None, written: bool
) -> None:
    """Draw a cell with its tool tip, and with `written` its value."""
    from matplotlib.patches import Rectangle

    value = panel.value(cell)
    face = _face(panel, cell, colour)
    edge = GRID if value is None else PAPER
    patch = Rectangle((place[0] + 0.02, place[1] + 0.02), 0.96, 0.96, fc=face, ec=edge, lw=0.6)
    facts = [_apart(cell), f"largest {cell.largest:.3g}"]
    facts += [f"{cell.task_angle:.1f} degrees"] if cell.task_angle is not None else []
    patch.set_gid(f"tip:{printable(cell.group)}: {', '.join(facts)}")
    axis.add_patch(patch)
    if written:
        dark = not isinstance(face, str) and 0.3 * face[0] + 0.59 * face[1] + 0.11 * face[2] < 0.55
        text = ("–" if cell.norm_difference or panel is ANGLE else "0") if value is None else panel.text(value)
        ink = MUTED if value is None else ("#fffffe" if dark else "#000001")
        axis.text(place[0] + 0.5, place[1] + 0.52, text, ha="center", va="center", fontsize=7.5, color=ink)


def _face(panel: Panel, cell: Difference, colour: ScalarMappable | None) -> str | Rgba:
    """The colour of a cell; without a value white, or grey if a is zero and b is not."""
    value = panel.value(cell)
    if value is not None and colour is not None:
        red, green, blue, alpha = colour.to_rgba(np.asarray(value))
        return red, green, blue, alpha
    return GRID if panel is RELATIVE and cell.norm_difference else PAPER


def _frame(axis: Axes, across: int, down: int) -> None:
    """Put the first row on top, without frame and grid."""
    axis.set_xlim(0, across)
    axis.set_ylim(down, 0)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


# --- output ---------------------------------------------------------------------------------------------------------


def check_plot(path: Path, force: bool) -> None:
    """Check the path of a plot before any work. Raises UsageError for its suffix, OutputError if it is not writable."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {path} is neither .svg nor .png", "give a file name with one of these suffixes")
    if path.is_dir():
        raise OutputError(f"--plot {path} is a directory", "choose another name")
    if path.exists() and not force:
        raise OutputError(f"--plot {path} exists", "choose another name, or replace it with --force")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write --plot {path}: {path.parent} is not a writable directory", "create it first")


def write_heat_map(difference: ModelDifference, path: Path, force: bool = False) -> None:
    """Draw the map and write it as SVG or PNG by the suffix, in one rename.

    The same comparison gives the same bytes.
    """
    check_plot(path, force)
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}{path.suffix}")
    try:
        write_figure(heat_map(difference), temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
