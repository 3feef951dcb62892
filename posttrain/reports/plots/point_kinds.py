"""The kinds of the points of a front: words, marks and groups for tables, pictures and sentences. Pure.

    base, sft, policy, line, trajectory, or the name of a merge method: linear, slerp, liti, ties, ...

Every merge method has its own word and its own mark. SLERP and LITI, of which WARP is made, have fixed marks.
"""

from __future__ import annotations

from gemma2.merging.methods.table import METHODS

__all__ = ["HOLLOW", "KINDS", "LINE", "glyph_of", "is_merge", "is_merged", "line_word", "marker_of", "word_of"]

LINE = "line"
HOLLOW = ("policy", LINE)
# In the order of the legend.
KINDS = ("base", "sft", "policy", *METHODS, LINE, "trajectory")
WORDS = {
    "base": "before RL", "sft": "start of RL", "policy": "RL policy", "trajectory": "during RL",
    "slerp": "SLERP", "liti": "LITI", "warp": "WARP merge", "ema": "EMA", "nuslerp": "NuSLERP",
    "multislerp": "MultiSLERP", "ties": "TIES", "dare": "DARE", "dare-ties": "DARE-TIES", "della": "DELLA",
    "della-linear": "DELLA-linear", "breadcrumbs": "Breadcrumbs", "breadcrumbs-ties": "Breadcrumbs-TIES",
    "sce": "SCE", "ram": "RAM", "ram-plus": "RAM+", "nearswap": "NearSwap", "arcee-fusion": "Arcee Fusion",
    "nuslerp-rows": "NuSLERP by rows",
    "model-stock": "Model Stock", "task-arithmetic": "task arithmetic", "passthrough": "passthrough",
}  # fmt: skip
MARKERS = {"base": "X", "sft": "o", "policy": "o", LINE: "o", "slerp": "D", "liti": "s"}
Marker = str | tuple[int, int, int]
# Of the other methods, in the order of their table. A triple: corners, 1 for a star, angle.
OTHER_MARKERS: tuple[Marker, ...] = ("^", "v", "P", "*", "p", "<", ">", "h", "d", "8")
OTHER_MARKERS += ((4, 1, 0), (4, 1, 45), (3, 1, 0), (3, 1, 180), (6, 1, 0), (8, 1, 0))
OTHER_MARKERS += ((4, 0, 20), (5, 0, 180), (7, 0, 0), (5, 1, 180), (7, 1, 0), (9, 1, 0))
GLYPHS = {"base": "×", "sft": "●", "policy": "○", "slerp": "◆", "liti": "■", LINE: "•"}
OTHER_GLYPH = "▲"


def is_merge(kind: object) -> bool:
    """Whether a kind is that of a model that a merge wrote."""
    return kind in METHODS


def is_merged(kind: object) -> bool:
    """Whether a kind is that of a merge or of a place on a line, which is a merge in memory."""
    return kind == LINE or is_merge(kind)


def word_of(kind: str) -> str:
    """The word of a kind: `RL policy`, `SLERP`, `linear merge`."""
    return WORDS.get(kind) or (f"{kind} merge" if is_merge(kind) else kind)


def line_word(ends: set[str]) -> str:
    """The word of the eta lines, whose merged ends have these kinds: `start to SLERP, by η`."""
    words = {word_of(end) for end in ends} or {word_of("slerp")}
    return f"start to {words.pop() if len(words) == 1 else 'merge'}, by η"


def marker_of(kind: str) -> Marker:
    """The mark of a kind in a picture, in matplotlib's terms."""
    others = [name for name in METHODS if name not in MARKERS]
    return MARKERS.get(kind) or OTHER_MARKERS[others.index(kind) % len(OTHER_MARKERS)]


def glyph_of(kind: str) -> str:
    """The mark of a kind in plain characters."""
    return GLYPHS.get(kind, OTHER_GLYPH if is_merge(kind) else "•")
