"""A graph as SVG: boxes of two lines with a mark for the status, edges with arrow heads, wide or narrow.

An element of a page uses the page's CSS variables, with the colours below as fallback; a file has its own light and
dark style. Text stays text. Sizes are CSS pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from gemma2.core.outputs.safetensors_header import printable
from gemma2.posttrain.reports.plots.values import clipped, columns_of

from .graph import Graph, Node
from .lanes import lanes_of
from .layers import layered

__all__ = ["drawing"]

Box = tuple[float, float, float, float]  # left, top, width, height
LIGHT = {"paper": "#ffffff", "raised": "#f6f8fa", "ink": "#1d232e", "muted": "#5c6675", "grid": "#dfe3e8"}
LIGHT |= {"hue0": "#0072b2", "hue1": "#d55e00", "hue2": "#009e73", "hue4": "#8a6d00"}
DARK = {"paper": "#14181f", "raised": "#1c222c", "ink": "#e8ebf0", "muted": "#9aa5b5", "grid": "#2e3643"}
DARK |= {"hue0": "#5ab4ee", "hue1": "#ff8a3d", "hue2": "#2fcf9f", "hue4": "#d9b93b"}
# status -> (colour, dashes of the border, its width)
STATUSES = {
    "complete": ("hue0", "", 1),
    "running": ("hue2", "", 2),
    "failed": ("hue1", "", 2),
    "interrupted": ("hue4", "6 3", 2),
    "blocked": ("muted", "3 3", 1),
    "waiting": ("muted", "3 3", 1),
    "not needed": ("muted", "1 4", 1),
}
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',Arial,sans-serif"
# Upper bounds of the width of a character at 13 and 11.5 px: a box must have room for its text in any of these fonts.
LETTER, SMALL = 8.3, 7.1
PAD, MARK, LINE, TALL = 11.0, 19.0, 30.0, 46.0  # padding, width of the mark, heights of boxes of one and two lines
WIDEST, NARROW_WIDTH, MARGIN = 30, 360.0, 3.0  # letters of a name, width of the narrow form, margin of the drawing
SMALLEST = 0.6  # share of its size to which a page may shrink a wide graph; beyond this it scrolls
FRAMED = {False: 5, True: 3}  # least number of parallel copies that share a frame, by `narrow`
ACROSS, GAP = 4, 10.0  # boxes per row of a frame, and the gap between them
PITCH, ALL_LANES, REACH = 13.0, 120.0, 14.0  # distance of lanes, limit for all lanes, distance from lanes to boxes


def drawing(graph: Graph, narrow: bool, page: str | None) -> str:
    """The graph as one <svg> element. `page`: prefix of ids for an element of a page, None for a file."""
    groups = graph.copies(FRAMED[narrow])
    numbers = {name: i for i, names in enumerate(groups) for name in names}
    links: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for upper, lower in graph.down:
        links.setdefault((numbers[upper], numbers[lower]), []).append((upper, lower))
    scene = (list_of if narrow else layers_of)(graph, groups, links)
    return document(scene, page, len(graph.nodes), any(node.href for node in graph.nodes.values()))


class Scene:
    """Pieces of the drawing; edges are drawn before frames and boxes."""

    def __init__(self, graph: Graph, width: float, height: float) -> None:
        self.graph, self.width, self.height = graph, width, height
        self.edges: list[str] = []
        self.boxes: list[str] = []

    def edge(self, path: str, pairs: Sequence[tuple[str, str]]) -> None:
        """Add one path for these (upper, lower) pairs, with arrow heads at the targets of the edges."""
        roles = self.graph.roles
        turned = [(lower, upper) for upper, lower in pairs]
        heads = {"end": pairs, "start": turned}
        ends = "".join(f' marker-{end}="url(#ARROW)"' for end in heads if any(pair in roles for pair in heads[end]))
        title = "\n".join(self.graph.title(pair) for pair in [*pairs, *turned] if pair in roles)
        self.edges.append(f'<path class="edge" d="{path}"{ends}>{titled(title)}</path>')

    def frame(self, names: Sequence[str], outer: Box, boxes: Sequence[Box]) -> None:
        """Add the boxes of parallel copies in one frame, or a single box."""
        if len(names) > 1:
            self.boxes.append(f'<rect class="frame" {rectangle(outer)} rx="9"/>')
        for name, box in zip(names, boxes, strict=True):
            self.boxes.append(boxed(self.graph.nodes[name], box))


# --- wide: layers ---------------------------------------------------------------------------------------------------


def layers_of(
    graph: Graph, groups: Sequence[Sequence[str]], links: Mapping[tuple[int, int], Sequence[tuple[str, str]]]
) -> Scene:
    """The wide form: layers from top to bottom."""
    cells = [cell_of([graph.nodes[name] for name in names]) for names in groups]
    sizes = [frame_size(cell, len(names)) for cell, names in zip(cells, groups, strict=True)]
    layout = layered(sizes, list(links))
    scene = Scene(graph, layout.width, layout.height)
    for i, names in enumerate(groups):
        scene.frame(names, layout.boxes[i], list(inside(layout.boxes[i], cells[i], len(names))))
    into: dict[int, list[tuple[int, int]]] = {}
    for link in links:
        into.setdefault(link[1], []).append(link)
    for target, arriving in into.items():
        arriving.sort(key=lambda link: layout.routes[link][-2])
        step = min(14.0, 0.6 * sizes[target][0] / len(arriving))
        for i, link in enumerate(arriving):
            x, y = layout.routes[link][-1]
            end = (x + (i - (len(arriving) - 1) / 2) * step, y)
            scene.edge(curve([*layout.routes[link][:-1], end]), links[link])
    return scene


def cell_of(nodes: Sequence[Node]) -> tuple[float, float]:
    """Width and height for each of these boxes, so that all texts fit."""
    letters = max(max(LETTER * width_of(node.label), SMALL * width_of(node.second)) for node in nodes)
    marked = any(node.status for node in nodes)
    tall = any(node.second for node in nodes)
    width = min(letters, LETTER * WIDEST) + 2 * PAD + (MARK if marked else 0)
    return round(max(width, 64.0), 1), TALL if tall else LINE


def frame_size(cell: tuple[float, float], count: int) -> tuple[float, float]:
    """Width and height of `count` boxes with their frame; of the box alone if there is one."""
    if count == 1:
        return cell
    columns, rows = min(ACROSS, count), -(-count // ACROSS)
    return columns * (cell[0] + GAP) + GAP, rows * (cell[1] + GAP) + GAP


def inside(outer: Box, cell: tuple[float, float], count: int) -> Iterator[Box]:
    """Yield the boxes in a frame."""
    if count == 1:
        yield outer
        return
    for i in range(count):
        row, column = divmod(i, ACROSS)
        left, top = outer[0] + GAP + column * (cell[0] + GAP), outer[1] + GAP + row * (cell[1] + GAP)
        yield left, top, *cell


def curve(points: Sequence[tuple[float, float]]) -> str:
    """SVG path along the points: straight through a layer, a curve between two layers."""
    path = [f"M{place(*points[0])}"]
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        if i % 2 == 0:
            path += [f"L{place(x1, y1)}"] if (x0, y0) != (x1, y1) else []
        else:
            middle = (y0 + y1) / 2
            path.append(f"C{place(x0, middle)} {place(x1, middle)} {place(x1, y1)}")
    return "".join(path)


# --- narrow: a list with lanes --------------------------------------------------------------------------------------


def list_of(
    graph: Graph, groups: Sequence[Sequence[str]], links: Mapping[tuple[int, int], Sequence[tuple[str, str]]]
) -> Scene:
    """The narrow form: a box per row, lanes on the left."""
    last = [max([i, *(lower for upper, lower in links if upper == i)]) for i in range(len(groups))]
    lanes = lanes_of(last)
    count = 1 + max((lane for lane in lanes if lane is not None), default=-1)
    pitch = min(PITCH, ALL_LANES / max(count, 1))
    left = REACH + pitch * count if count else 0.0
    scene = Scene(graph, NARROW_WIDTH, 0.0)
    tops, ends = [], []
    for names in groups:
        tops.append(scene.height)
        pad = GAP / 2 if len(names) > 1 else 0.0
        boxes, y = [], scene.height + pad
        for name in names:
            height = TALL if graph.nodes[name].second else LINE
            boxes.append((left + pad, y, NARROW_WIDTH - left - 2 * pad, height))
            y += height + (4.0 if name != names[-1] else pad)
        scene.frame(names, (left, scene.height, NARROW_WIDTH - left, y - scene.height), boxes)
        ends.append(y)
        scene.height = y + GAP
    scene.height = max(scene.height - GAP, 0.0)
    for (upper, lower), pairs in links.items():
        x = left - REACH - pitch * (lanes[upper] or 0)
        scene.edge(detour(left, x, ends[upper] - 12, tops[lower] + 12), pairs)
    return scene


def detour(left: float, x: float, start: float, end: float) -> str:
    """SVG path to the left out of a box, down a lane and into another box, with round corners."""
    r = min(6.0, left - x, (end - start) / 2)
    corners = f"Q{place(x, start)} {place(x, start + r)}V{short(end - r)}Q{place(x, end)} {place(x + r, end)}"
    return f"M{place(left, start)}H{short(x + r)}{corners}H{short(left)}"


# --- pieces ---------------------------------------------------------------------------------------------------------


def boxed(node: Node, box: Box) -> str:
    """A box with its mark and two lines; the tool tip has the full texts."""
    x, y, width, height = box
    kind = node.status.replace(" ", "-") if node.status in STATUSES else "other"
    start = x + PAD + (MARK if node.status else 0)
    room = x + width - PAD - start
    lines = [f'<rect class="box {kind}" {rectangle(box)} rx="6"/>']
    if node.status:
        lines.append(
            f'<g class="mark {kind}" transform="translate({place(x + PAD + 6, y + height / 2)})">{mark(kind)}</g>'
        )
    at = y + (19.5 if node.second else 19.5 - (TALL - height) / 2 + 8)
    lines.append(f'<text class="name" x="{short(start)}" y="{short(at)}">{text(node.label, room / LETTER)}</text>')
    if node.second:
        shown = node.shown_status
        word = f'<tspan class="{kind}">{text(shown)}</tspan>' if shown else ""
        left = room / SMALL - (width_of(shown) + 3 if shown else 0)
        detail = text(node.detail, max(left, 3)) if node.detail else ""
        joint = " · " if detail and word else ""
        lines.append(f'<text class="detail" x="{short(start)}" y="{short(y + 35.5)}">{detail}{joint}{word}</text>')
    tip = [f"{node.label}: {node.status}" if node.status else node.label, node.detail, node.tip]
    body = f"<g>{titled(chr(10).join(line for line in tip if line))}{''.join(lines)}</g>"
    return f'<a href="{escape(node.href)}">{body}</a>' if node.href else body


def mark(kind: str) -> str:
    """The mark of a status, centred at (0, 0), distinct without its colour."""
    ring = '<circle r="5.2" class="line"/>'
    return {
        "complete": '<circle r="6" class="full"/><path d="M-2.8 .2-.8 2.2 2.9-2" class="cut"/>',
        "running": f'{ring}<path d="M0-5.2A5.2 5.2 0 0 1 0 5.2Z" class="full"/>',
        "failed": '<rect x="-6" y="-6" width="12" height="12" rx="2" class="full"/>'
        '<path d="M-2.7-2.7 2.7 2.7M2.7-2.7-2.7 2.7" class="cut"/>',
        "interrupted": '<path d="M-2.6-4.6V4.6M2.6-4.6V4.6" class="line bar"/>',
        "blocked": f'{ring}<path d="M-3.6 3.6 3.6-3.6" class="line"/>',
        "not-needed": '<path d="M-4.5 0H4.5" class="line"/>',
    }.get(kind, ring)


def width_of(written: str) -> int:
    """Width of a name in letters; a wide character counts as two."""
    return columns_of(printable(written))


def text(written: str, letters: float = 1e9) -> str:
    """The text escaped, with its middle cut if it exceeds `letters`."""
    return escape(clipped(printable(written), max(int(letters + 0.1), 3)))


def titled(written: str) -> str:
    """A <title> element, the tool tip; line breaks are kept."""
    return f"<title>{chr(10).join(escape(printable(line)) for line in written.splitlines())}</title>"


def rectangle(box: Box) -> str:
    names = ("x", "y", "width", "height")
    return " ".join(f'{name}="{short(value)}"' for name, value in zip(names, box, strict=True))


def place(x: float, y: float) -> str:
    return f"{short(x)} {short(y)}"


def short(value: float) -> str:
    """A number with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


# --- the document ---------------------------------------------------------------------------------------------------


def document(scene: Scene, page: str | None, count: int, linked: bool) -> str:
    """The <svg> element around the pieces."""
    name = escape(f"{page}-graph" if page else "graph")
    width, height = scene.width + 2 * MARGIN, scene.height + 2 * MARGIN
    view = f'viewBox="{short(-MARGIN)} {short(-MARGIN)} {short(width)} {short(height)}"'
    if page:  # as wide as the page, but never blown up; a graph too wide to be read is scrolled
        size = f'class="figure dag" style="max-width:{short(width)}px;min-width:{short(SMALLEST * width)}px"'
        size = size if scene.width > NARROW_WIDTH else 'class="figure dag"'
    else:
        size = f'width="{short(width)}" height="{short(height)}"'
    # Screen readers announce a single image; if there are links, a group whose parts can be reached.
    role = f'role="{"group" if linked else "img"}" aria-label="Graph of {count} boxes"'
    parts = "\n".join([*scene.edges, *scene.boxes]).replace("url(#ARROW)", f"url(#{name}-arrow)")
    paper = "" if page else f'<rect class="paper" {rectangle((-MARGIN, -MARGIN, width, height))}/>\n'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" id="{name}" {view} {size} {role}>\n'
        f"<style>{style(name, page)}</style>\n"
        f'<defs><marker id="{name}-arrow" viewBox="0 0 8 8" refX="7.4" refY="4" markerWidth="7.5" markerHeight="7.5" '
        'markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
        '<path class="head" d="M.4.8 7.6 4 .4 7.2Z"/></marker></defs>\n'
        f"{paper}{parts}\n</svg>\n"
    )


def style(name: str, page: str | None) -> str:
    """The CSS rules of one drawing, with the page's variables, or with light and dark colours."""
    if page:
        return rules(name, {key: f"var(--{key},{colour})" for key, colour in LIGHT.items()})
    return f"{rules(name, LIGHT)}@media (prefers-color-scheme:dark){{{rules(name, DARK)}}}"


def rules(name: str, c: Mapping[str, str]) -> str:
    """CSS rules with these colours, limited to the element `name`."""
    found = {
        ".paper": f"fill:{c['paper']}",
        ".edge": f"fill:none;stroke:{c['muted']};stroke-width:1.3;stroke-opacity:.75",
        ".edge:hover": f"stroke:{c['hue0']};stroke-width:2.2;stroke-opacity:1",
        ".head": f"fill:{c['muted']}",
        ".frame": f"fill:{c['paper']};stroke:{c['muted']};stroke-dasharray:2 3",
        ".box": f"fill:{c['raised']};stroke:{c['muted']};stroke-opacity:.55",
        "text": f"font-family:{FONT};fill:{c['ink']}",
        ".name": "font-size:13px;font-weight:600",
        ".detail": f"font-size:11.5px;fill:{c['muted']}",
        ".line": f"fill:none;stroke:{c['muted']};stroke-width:1.6",
        ".bar": "stroke-width:3",
        ".cut": f"fill:none;stroke:{c['paper']};stroke-width:1.8",
        "a:hover .box": f"stroke:{c['hue0']};stroke-opacity:1",
    }
    for status, (colour, dashes, width) in STATUSES.items():
        kind = status.replace(" ", "-")
        border = f"stroke-dasharray:{dashes};" if dashes else ""
        loud = f"stroke:{c[colour]};stroke-opacity:1;" if width > 1 else ""
        found |= {
            f".box.{kind}": f"{border}{loud}stroke-width:{width}",
            f".mark.{kind} .full": f"fill:{c[colour]}",
            f".mark.{kind} .line": f"stroke:{c[colour]}",
            f"tspan.{kind}": f"fill:{c[colour]};font-weight:600",
        }
    return "".join(f"#{name} {selector}{{{text}}}" for selector, text in found.items())
