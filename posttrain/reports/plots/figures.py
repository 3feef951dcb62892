"""Figures of a WARP run: the KL-reward front and training curves. PNG, SVG and SVG for a web page.

Colour shows the iteration (Okabe-Ito, safe for colour-blind readers), shape shows the kind of point, and important
points have labels next to them, so that a figure is readable in print without colour. Matplotlib is imported on first
use and without pyplot: no global state, no display.

Every figure has a wide and a narrow form; phones get the narrow one, in readable letters, instead of a shrunken page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.json_files import JsonMapping
from gemma2.core.rounding import SAME_AS_START, differ

from .gains import called
from .labels import FAINT, Label, label_points
from .point_kinds import HOLLOW, KINDS, is_merge, line_word, marker_of, word_of
from .textplot import front_text, line_labels, off_chart
from .values import end_of, fixed, start_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves_figure", "front_figure", "front_text", "page_svg", "write_figure"]

Point = JsonMapping

INK, MUTED, GRID, PAPER = "#1d232e", "#5c6675", "#dfe3e8", "#ffffff"
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7f4fc9")
# Colour in the figure -> CSS variable with which a page may replace it.
THEME = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {hue: f"hue{i}" for i, hue in enumerate(HUES)}
SHADES = ("#f4f7fa", "#a9cfe8", "#3a88bd", "#08477a", "#04203a")  # of heat maps: one hue, light to dark
MANY = 12  # more RL runs than this are drawn smaller and without error bars
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,  # names come from files and may contain a $
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "gemma2",
    "path.simplify": True,
}


def hue(iteration: int | None) -> str:
    """The colour of an iteration (from 1); ink without iteration."""
    return HUES[(iteration - 1) % len(HUES)] if iteration else INK


def colour_of(point: Point) -> str:
    """The colour of a point and of its label."""
    return MUTED if point["kind"] == "base" else hue(point.get("iteration"))


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure, its size in inches, and its axes, in the style of all figures. Call inside `styled()`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [axis for row in axes for axis in row]


def styled() -> AbstractContextManager[None]:
    """Context with the style of all figures; leaves matplotlib's global settings unchanged."""
    from matplotlib import rc_context

    context: AbstractContextManager[None] = rc_context(RC)
    return context


# --- the front ------------------------------------------------------------------------------------------------------


def front_figure(points: Sequence[Point], narrow: bool = False) -> Figure:
    """Reward over KL to the SFT policy: points with error bars, every iteration's eta line joined, RL runs faint.

    points: as in front.json.
    """
    with styled():
        figure, (axis,) = new_figure(*((4.0, 4.4) if narrow else (7.6, 4.8)))
        if not differ(points):
            axis.set_axis_off()
            axis.text(0.5, 0.5, SAME_AS_START.capitalize(), ha="center", color=MUTED, transform=axis.transAxes)
            return figure
        measured = [point for point in points if point["kind"] != "trajectory"]
        draw_trajectories(axis, points)
        away = off_chart(measured)
        measured = [point for point in measured if point not in away]
        draw_lines(axis, measured)
        crowded = sum(point["kind"] == "policy" for point in measured) > MANY
        for point in measured:
            draw_point(axis, point, crowded and point["kind"] == "policy")
        axis.set_xlabel(f"KL to the {start_of(points)} policy (nats per sequence)")
        axis.set_ylabel("reward on held-out prompts")
        axis.margins(0.09)
        for i, point in enumerate(away):
            note = f"off the chart: {called(point)}, reward {fixed(point['reward'], 2)} at KL {fixed(point['kl'], 2)}"
            axis.annotate(
                note, (1, 0), (-4, 5 + 12 * i), "axes fraction", "offset points", ha="right", color=MUTED, fontsize=8
            )
        draw_legend(figure, points, columns=2 if narrow else 5)
        label_points(figure, axis, measured, [Label(*label, colour_of(label[0])) for label in labels_of(measured)])
        return figure


def draw_trajectories(axis: Axes, points: Sequence[Point]) -> None:
    """Draw the curve of each RL run as a thin line: where it started, if known, its evaluations, the policy."""
    names = dict.fromkeys(point["run"] for point in points if point["kind"] == "trajectory" and point.get("run"))
    alpha = 0.6 if len(names) <= MANY else FAINT
    for name in names:
        path = run_path(points, name)
        colour = hue(path[-1].get("iteration"))
        axis.plot(
            [p["kl"] for p in path],
            [p["reward"] for p in path],
            color=colour,
            lw=0.9,
            ls=(0, (4, 2)),
            alpha=alpha,
            zorder=1,
        )
        steps = [point for point in path if point["kind"] == "trajectory"]
        axis.plot(
            [p["kl"] for p in steps],
            [p["reward"] for p in steps],
            ".",
            color=colour,
            ms=5,
            alpha=alpha,
            mew=0,
            zorder=1,
        )


def run_path(points: Sequence[Point], run: str) -> list[Point]:
    """The points of a run in the order of its steps. A run without an evaluation at step 0 began at the SFT policy."""
    steps = [point for point in points if point["kind"] == "trajectory" and point.get("run") == run]
    steps.sort(key=lambda point: point.get("step") or 0)
    start = [] if steps and steps[0].get("step") == 0 else [p for p in points if p["kind"] == "sft"]
    return [*start[:1], *steps, *(p for p in points if p["kind"] == "policy" and p["name"] == run)]


def draw_lines(axis: Axes, points: Sequence[Point]) -> None:
    """Draw the eta line of each iteration."""
    line = [point for point in points if point["kind"] == "line"]
    for iteration in dict.fromkeys(point.get("iteration") for point in line):
        path = sorted((p for p in line if p.get("iteration") == iteration), key=lambda p: p["eta"])
        axis.plot([p["kl"] for p in path], [p["reward"] for p in path], color=hue(iteration), lw=2.2, zorder=2)


def draw_point(axis: Axes, point: Point, small: bool = False) -> None:
    """Draw a point with its 95 % intervals, or standard errors without intervals; RL policies and etas are hollow.

    small: smaller and without bars, for one of many.
    """
    kind, colour = point["kind"], colour_of(point)
    size = {"line": 4.5, "policy": 3.5 if small else 5.5, "sft": 8.0}.get(kind, 7.5)
    axis.errorbar(
        point["kl"],
        point["reward"],
        xerr=None if small else reach(point, "kl"),
        yerr=None if small else reach(point, "reward"),
        ls="none",
        marker=marker_of(kind),
        ms=size,
        color=colour,
        mfc=PAPER if kind in HOLLOW else colour,
        mec=colour,
        mew=1.0 if small else 1.5,
        ecolor=colour,
        elinewidth=0.9,
        zorder=3 if kind in HOLLOW else 4,
    )[0].set_gid(f"tip:{point_tip(point)}")


def reach(point: Point, key: str) -> list[list[float]] | float | None:
    """Length of the error bar: down and up to the ends of the interval, or one standard error to both sides."""
    ends = [point.get(f"{key}_low"), point.get(f"{key}_high")]
    if any(end is None for end in ends):
        return point.get(f"{key}_se") or None
    return [[max(0.0, point[key] - ends[0])], [max(0.0, ends[1] - point[key])]]


def point_tip(point: Point) -> str:
    """The tool tip of a point."""
    return f"{called(point)}: reward {figure_of(point, 'reward', 3)}, KL {figure_of(point, 'kl', 2)} nats"


def figure_of(point: Point, key: str, digits: int) -> str:
    """A value with its interval, or without one, its standard error."""
    low, high = point.get(f"{key}_low"), point.get(f"{key}_high")
    if low is not None and high is not None:
        return f"{point[key]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    return f"{point[key]:.{digits}f}" + (f" ± {point[f'{key}_se']:.3g}" if point.get(f"{key}_se") else "")


def draw_legend(figure: Figure, points: Sequence[Point], columns: int) -> None:
    """Draw the legend: every kind of mark that is drawn, the error bars, the colours of the iterations."""
    from matplotlib.lines import Line2D

    kinds = [k for k in KINDS if k != "trajectory" and any(point["kind"] == k for point in points)]
    names = {kind: word_of(kind) for kind in kinds}
    names |= {"line": line_word({end_of(point) for point in points if point["kind"] == "line"})}
    entries = [
        Line2D([], [], color=MUTED, lw=2.2 if kind == "line" else 0, marker=marker_of(kind), ms=5.5,
               mfc=PAPER if kind in HOLLOW else MUTED, mec=MUTED, mew=1.4, label=names[kind])
        for kind in kinds
    ]  # fmt: skip
    if any(point["kind"] == "trajectory" for point in points):
        entries.append(
            Line2D(
                [], [], color=MUTED, lw=0.9, ls=(0, (4, 2)), alpha=0.8, marker=".", ms=5, label=word_of("trajectory")
            )
        )
    bars = "95 % interval" if any(point.get("reward_low") is not None for point in points) else "standard error"
    entries.append(Line2D([], [], color=MUTED, lw=0, marker="|", ms=10, mew=0.9, label=bars))
    iterations = sorted({p["iteration"] for p in points if p.get("iteration")})
    entries += [Line2D([], [], color=hue(i), lw=5, solid_capstyle="butt", label=f"iteration {i}") for i in iterations]
    figure.legend(
        handles=entries, loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5, labelcolor=MUTED,
        handletextpad=0.5, columnspacing=1.3, borderaxespad=0.2,
    )  # fmt: skip


def labels_of(points: Sequence[Point]) -> list[tuple[Point, str, int]]:
    """(point, text, rank) of every label, the most important (rank 0) first: the last merge; base, SFT, merges and
    lines by their iteration; the best single RL run (1); then other models and the etas of the last line (2)."""
    runs = [point for point in points if point["kind"] == "policy" and point.get("iteration")]
    first = min((point["iteration"] for point in runs), default=None)
    single = [point for point in runs if point["iteration"] == first]  # RL without merging
    best = max(single, key=lambda point: point["reward"], default=None)
    chosen: list[tuple[Point, str, int]] = []
    for point in points:
        if point["kind"] in ("base", "sft") or is_merge(point["kind"]):
            chosen.append((point, called(point), 0))
        elif point is best:
            chosen.append((point, called(point), 1))
        elif point["kind"] == "policy" and not point.get("iteration"):
            chosen.append((point, called(point), 2))
    chosen += [(point, text, 2 if text[0] == "η" else 0) for point, text in line_labels(points)]
    return sorted(chosen, key=lambda item: (item[2], -(item[0].get("iteration") or 0)))


# --- curves ---------------------------------------------------------------------------------------------------------


def curves_figure(
    runs: Mapping[str, Sequence[JsonMapping]], metrics: Mapping[str, str], narrow: bool = False
) -> Figure:
    """Small multiples: one panel per metric, one curve per run, over optimizer steps.

    runs: name -> rows with `step`, the metrics, and `iteration`. metrics: key in the rows -> title of the panel.
    """
    from matplotlib.lines import Line2D

    with styled():
        count = len(metrics)
        figure, axes = new_figure(4.0, 2.1 * count, count, 1) if narrow else new_figure(7.6, 2.7, 1, count)
        for axis, (key, title) in zip(axes, metrics.items(), strict=True):
            axis.set_title(title, loc="left", fontsize=9.5, color=INK)
            axis.set_xlabel("step", fontsize=8.5)
            axis.tick_params(labelsize=8.5, length=0)
            for name, rows in runs.items():
                values = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
                if not values:
                    continue
                steps, heights = zip(*values, strict=True)
                colour = hue(rows[0].get("iteration"))
                width, alpha = (1.4, None) if len(runs) <= MANY else (0.8, 0.6)
                if len(runs) <= MANY:
                    axis.plot(steps, heights, color=colour, lw=0.7, alpha=0.25)
                axis.plot(steps, smooth(heights), color=colour, gid=f"tip:{name}", lw=width, alpha=alpha)
        iterations = sorted({rows[0]["iteration"] for rows in runs.values() if rows and rows[0].get("iteration")})
        if len(iterations) > 1:
            figure.legend(
                handles=[Line2D([], [], color=hue(i), lw=1.8, label=f"iteration {i}") for i in iterations],
                loc="outside upper left", ncols=3 if narrow else 8, frameon=False, fontsize=8.5, labelcolor=MUTED,
            )  # fmt: skip
        return figure


def smooth(values: Sequence[float], share: float = 0.06) -> list[float]:
    """Centred running mean over `share` of the length on either side, shorter at the ends."""
    reach = round(len(values) * share)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


# --- output ---------------------------------------------------------------------------------------------------------


def write_figure(figure: Figure, path: Path) -> None:
    """Write PNG (160 dpi) or SVG by the suffix; the same figure gives the same bytes."""
    with styled():
        if path.suffix == ".svg":
            path.write_text(svg_text(figure), encoding="utf-8")
        else:
            figure.savefig(path, dpi=160, metadata={"Software": None})


def svg_text(figure: Figure) -> str:
    """The figure as a standalone SVG document; text stays text, points have tool tips."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r'<g id="tip:([^"]*)">', lambda found: f"<g><title>{found[1]}</title>", buffer.getvalue())
    return svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def page_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an element of a page: colours from CSS variables, ids prefixed with `name`, width from the page.

    `description` is for screen readers; it is escaped here.
    """
    svg = svg_text(figure)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in THEME.items():
        svg = re.sub(re.escape(colour), f"var(--{variable}, {colour})", svg, flags=re.IGNORECASE)
    svg = re.sub(r' (width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    return svg.replace("<svg", f'<svg class="figure" role="img" aria-label="{escape(description)}"', 1)
