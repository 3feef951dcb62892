"""The points that a front measures: policies, and places on the line from init to merge, with kinds and names.

Torch-free.

    kind   sft         where RL started, and what KL is measured to
           base        what the SFT policy was made from
           policy      any other model; slerp and liti where its manifest says so
           line        (1 - eta) * init + eta * merged, formed in memory
           trajectory  what an RL run measured of itself on the way, alike (trajectory.py)

A point is the same as another when kind, weights, eta and iteration are: it then appears once.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.schemas import ParetoConfig

__all__ = ["Candidate", "Weights", "assign_names", "plan_candidates", "short_names"]

ITERATION = re.compile(r"iteration-(\d+)")  # a folder of WARP


@dataclass(frozen=True)
class Weights:
    """A model directory, and the digest of its weights."""

    path: Path
    digest: str

    @classmethod
    def of(cls, path: Path) -> Weights:
        """Those that are in a directory."""
        return cls(path, digest_weights(path))


@dataclass(frozen=True)
class Candidate:
    """A point to measure. `models`: the policy, or for a place on the line its init and its merged end."""

    kind: str
    models: tuple[Weights, ...]
    iteration: int | None = None
    eta: float | None = None
    title: str = ""  # of what comes before RL: base, SFT, distilled

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of a point: equal keys are the same point."""
        return (self.kind, *(model.digest for model in self.models), self.eta, self.iteration)

    @property
    def whole(self) -> Weights | None:
        """The model that the point is: a policy, or the end of the line where the point is one; else None."""
        if self.eta is None:
            return self.models[0]
        return {0.0: self.models[0], 1.0: self.models[-1]}.get(self.eta)

    @property
    def labels(self) -> JsonObject:
        """Kind, title, iteration and eta, as they are in front.json."""
        titled = {"title": self.title} if self.title else {}
        return {"kind": self.kind, **titled, "iteration": self.iteration, "eta": self.eta}


def plan_candidates(config: ParetoConfig) -> list[Candidate]:
    """Every point of the front in the order of measuring, each once. Raises UsageError for an incomplete line."""
    if config.init is not None and config.merged is None:
        raise UsageError("--init is given and --merged is not", "give --merged, where the line ends")
    if any(not 0 <= eta <= 1 for eta in config.etas):
        raise UsageError(f"--etas {' '.join(map(str, config.etas))}: not all in 0 .. 1", "the line goes from 0 to 1")
    candidates = [Candidate("sft", (Weights.of(config.sft),), title=title_of(config.sft, "SFT"))]
    before = ancestors(config.sft)
    for path in config.policies:
        if path.resolve() != config.sft.resolve():
            kind = kind_of(path, before)
            title = title_of(path, "base") if kind == "base" else ""
            candidates.append(Candidate(kind, (Weights.of(path),), iteration_of(path), title=title))
    if config.merged is not None:
        ends = Weights.of(config.init or config.sft), Weights.of(config.merged)
        iteration = iteration_of(config.merged)
        candidates += [Candidate("line", ends, iteration, eta) for eta in sorted(set(config.etas))]
    return list({candidate.key: candidate for candidate in reversed(candidates)}.values())[::-1]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Directory names, each with the parent folders that distinguish it; all outputs of WARP with equally many."""
    places = {path.resolve() for path in paths}
    depths = {place: _depth(place, places) for place in places}
    alike = [place for place in places if ITERATION.fullmatch(place.parent.name)]
    depths |= dict.fromkeys(alike, max((depths[place] for place in alike), default=1))
    return ["/".join(place.parts[-depths[place] :]) for place in (path.resolve() for path in paths)]


def _depth(place: Path, places: Collection[Path]) -> int:
    """The fewest folders that distinguish a path from the others."""
    others = [other for other in places if other != place]
    depths = range(1, len(place.parts) + 1)
    return next((d for d in depths if all(o.parts[-d:] != place.parts[-d:] for o in others)), len(place.parts))


def assign_names(candidates: Sequence[Candidate]) -> list[str]:
    """One name each: SFT; the folders of a policy; `eta 0.3`, and with several lines which line it is of."""
    lines = list(dict.fromkeys(c.models for c in candidates if c.kind == "line"))
    line_names = dict(zip(lines, _line_names(candidates, lines), strict=True))
    policies = [c for c in candidates if c.kind not in ("line", "sft")]
    folders = dict(zip([c.models for c in policies], short_names([c.models[0].path for c in policies]), strict=True))
    names = []
    for candidate in candidates:
        if candidate.kind == "line":
            name = f"{line_names[candidate.models]}eta {candidate.eta:g}"
        else:
            name = folders[candidate.models] if candidate.kind != "sft" else "SFT"
        names.append(next(n for n in _numbered(name) if n not in names))
    return names


def _numbered(name: str) -> Iterator[str]:
    """The name, then `name (2)`, `name (3)`, ..."""
    yield name
    yield from (f"{name} ({number})" for number in count(2))


def _line_names(candidates: Sequence[Candidate], lines: Sequence[tuple[Weights, ...]]) -> list[str]:
    """The prefix of the etas of each line: nothing for a single one, else its iteration or its merged end."""
    if len(lines) == 1:
        return [""]
    iterations = [next(c.iteration for c in candidates if c.models == line and c.kind == "line") for line in lines]
    if None not in iterations and len(set(iterations)) == len(lines):
        return [f"iteration-{iteration}/" for iteration in iterations]
    return [f"{name}/" for name in short_names([line[-1].path for line in lines])]


def iteration_of(path: Path) -> int | None:
    """The number in the `iteration-<i>` folder that holds a policy of a WARP run."""
    found = [ITERATION.fullmatch(part) for part in path.resolve().parts]
    return next((int(match[1]) for match in reversed(found) if match), None)


def title_of(path: Path, otherwise: str) -> str:
    """The name of a policy before RL: by the command that made it."""
    command = (read_manifest(path) or {}).get("command")
    return {"sft": "SFT", "distill": "distilled"}.get(str(command), otherwise)


def ancestors(path: Path) -> set[str]:
    """Digests of the weights of every model that this one was made from, as far as directories are still there."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        directory = waiting.pop()
        for parent in (read_manifest(directory) or {}).get("parents", []):
            if parent.get("role") == "model" and parent["weights"] not in found:
                found.add(parent["weights"])
                waiting += [directory / parent["path"]] if "path" in parent else []
    return found


def kind_of(path: Path, before: Collection[str]) -> str:
    """The kind of a policy directory: slerp or liti by its manifest, base when it is among `before`, else policy."""
    manifest = read_manifest(path) or {}
    described = f"{manifest.get('command', '')} {(manifest.get('config') or {}).get('method', '')}"
    for kind in ("slerp", "liti"):
        if kind in described:
            return kind
    return "base" if digest_weights(path) in before else "policy"
