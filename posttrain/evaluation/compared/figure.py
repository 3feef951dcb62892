"""The figure of a suite's result: a line per task, our value with its interval, published values of Gemma 2 below it.

Shape and fill show whose value it is, so that the figure is readable without colour; the value is also written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.json_files import JsonMapping
from gemma2.posttrain.reports.plots.figures import HUES, INK, PAPER, new_figure, styled

from .result_table import Line, Table, is_tuned, result_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "results_figure", "write_figures"]

FIGURES = ("results.png", "results.svg")
GEMMA = {"gemma-2-2b": "s", "gemma-2-9b": "D", "gemma-2-27b": "^"}  # id -> marker
LONGEST = 28  # characters of a name in the legend
OUR_LINE, THEIR_LINE = 0.0, 0.24  # of a task: where our value is drawn, and the published ones below it


def write_figures(directory: Path, document: JsonMapping, source: str) -> None:
    """Write the figure of results.json as PNG and SVG."""
    from gemma2.posttrain.reports.plots.figures import write_figure

    figure = results_figure(result_table(document, source), is_tuned(document))
    for name in FIGURES:
        write_figure(figure, directory / name)


def results_figure(table: Table, tuned: bool = False, narrow: bool = False) -> Figure:
    """Per cent right of every task, each by the metric that published rows state."""
    lines = [line for line in table.lines if line.shown] or list(table.lines)
    with styled():
        figure, (axis,) = new_figure(4.0 if narrow else 7.6, 1.1 + 0.62 * len(lines))
        for place, line in enumerate(lines):
            _draw_ours(axis, place, line, shortened(table.model) if place == 0 else None)
        for number, (key, marker) in enumerate(GEMMA.items()):
            _draw_published(axis, lines, table, key, marker, HUES[number + 1])
        axis.set_yticks(range(len(lines)), [line.title for line in lines])
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set_xlabel("per cent right, bar: 95 % interval")
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.09)
        axis.tick_params(length=0)
        handles, names = axis.get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="outside upper center",
            ncols=2 if narrow else 4,
            frameon=False,
            fontsize=9,
            handletextpad=0.4,
        )
        return figure


def shortened(name: str) -> str:
    """A name that fits into the legend: its end tells models of one run apart."""
    return name if len(name) <= LONGEST else f"...{name[-LONGEST:]}"


def _draw_ours(axis: Axes, place: int, line: Line, label: str | None) -> None:
    if line.low is not None and line.high is not None:
        axis.plot([line.low, line.high], [place + OUR_LINE] * 2, color=HUES[0], lw=1.8, solid_capstyle="butt")
    axis.plot([line.value], [place + OUR_LINE], "o", color=HUES[0], ms=6, mew=0, ls="", label=label)
    axis.annotate(
        f"{line.value:.1f}",
        (line.value, place + OUR_LINE),
        (0, 7),
        textcoords="offset points",
        ha="center",
        color=INK,
        fontsize=9,
    )


def _draw_published(axis: Axes, lines: Sequence[Line], table: Table, key: str, marker: str, colour: str) -> None:
    found = [(table.published.cells.get((line.task, key)), place) for place, line in enumerate(lines) if line.shown]
    points = [(value.value, place + THEIR_LINE) for value, place in found if value is not None]
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    axis.plot(xs, ys, marker, ls="", ms=6, mfc=PAPER, mec=colour, mew=1.4, label=table.published.columns[key])
