"""Reads front.json and its samples for a report: usable points only; everything else becomes a gap. Torch-free."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from gemma2.core.json_files import JsonMapping, JsonObject, load_json
from gemma2.posttrain.provenance.recorded_files import changed_files, remake

from .plots.point_kinds import KINDS

__all__ = ["Front", "choose_front", "is_number", "read_front", "read_lines"]


@dataclass(frozen=True)
class Front:
    """One measurement: its stage, its points, and the rest of front.json."""

    name: str
    path: Path
    points: Sequence[JsonObject] = field(default_factory=tuple)
    facts: JsonMapping = field(default_factory=dict)

    @property
    def measured(self) -> list[JsonObject]:
        """The points without the RL trajectories."""
        return [point for point in self.points if point["kind"] != "trajectory"]

    @property
    def iteration(self) -> int | None:
        """Number of the WARP iteration, if the front belongs to one."""
        found = re.search(r"(?:^|/)iteration-(\d+)(?:/|$)", self.name)
        return int(found[1]) if found else None


def choose_front(fronts: Sequence[Front]) -> Front:
    """The front with the most points, the latest of equals; an empty front without any."""
    return max(reversed(fronts), key=lambda front: len(front.measured), default=Front("", Path()))


def read_front(name: str, directory: Path, gaps: list[str]) -> Front:
    """Read front.json with its usable points; without points if it cannot be read."""
    place = f"{name}/front.json" if name != "." else "front.json"
    if changed_files(directory, ["front.json"]):
        gaps.append(f"{place} was changed after it was measured and is not shown; {remake('pareto', directory)}")
        return Front(name, directory)
    try:
        front = load_json(directory / "front.json")
        points = [usable(point) for point in front["points"]]
    except FileNotFoundError:
        return Front(name, directory)  # an unfinished measurement, which is already among the gaps
    except (OSError, ValueError, KeyError, TypeError) as error:
        gaps.append(f"{place} cannot be read ({type(error).__name__})")
        return Front(name, directory)
    kept = [point for point in points if point]
    if not kept:
        gaps.append(f"{place} holds no point")
    elif len(kept) < len(points):
        gaps.append(f"{place}: {len(points) - len(kept)} of {len(points)} points cannot be used")
    return Front(name, directory, kept, {key: front[key] for key in front if key != "points"})


def usable(point: object) -> JsonObject | None:
    """The point with invalid figures set to None; None without a known kind, a finite reward and a finite KL."""
    if not isinstance(point, dict) or not (is_number(point.get("kl")) and is_number(point.get("reward"))):
        return None
    kind = str(point.get("kind"))
    eta, iteration = point.get("eta"), point.get("iteration")
    if kind not in KINDS or (kind == "line" and not is_number(eta)):
        return None
    labels = {"name": str(point.get("name", "")), "kind": kind, "iteration": iteration if is_whole(iteration) else None}
    parts = ("_se", "_low", "_high")
    figures = {key: value if is_number(value) else None for key, value in point.items() if key.endswith(parts)}
    return {**point, **figures, **labels, "eta": eta if is_number(eta) else None}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_lines(path: Path, place: str, gaps: list[str]) -> list[JsonObject]:
    """The objects of a JSONL file; unreadable lines are counted and left out. `place`: name of the file in a gap."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        gaps.append(f"{place} is missing")
        return []
    except OSError as error:
        gaps.append(f"{place} cannot be read ({error.strerror})")
        return []
    if changed_files(path.parent, [path.name]):
        gaps.append(f"{place} was changed after it was written")
    rows, torn = [], 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    if torn:
        gaps.append(f"{place} has {torn} unreadable line{'s' if torn > 1 else ''}")
    return rows
