"""The points that a front measures: policies, and places on the line from init to merge, with kinds and names.

Torch-free.

    kind   sft         where RL started, and what KL is measured to
           base        from before RL: made by `tiny`, `sft` or `distill`, or recorded as the parent of such a model
           slerp, ...  written by a merge: the name of its method
           policy      any other model, as an RL run writes
           line        (1 - eta) * init + eta * merged, formed in memory
           trajectory  what an RL run measured of itself on the way, alike (trajectory.py)

Kinds follow from the manifests of the given models alone, not from other folders, which may be moved or deleted.
Equal weights are one point, wherever they are stored; so are equal places on a line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import Manifest, read_manifest
from gemma2.core.progress import SILENT, Progress
from gemma2.merging.methods.table import METHODS
from gemma2.posttrain.schemas import ParetoConfig

__all__ = ["Candidate", "Weights", "assign_names", "plan_candidates", "short_names"]

ITERATION = re.compile(r"iteration-(\d+)")  # a folder of WARP
TRAINED_FROM = ("model", "policy")  # roles of the model that a training starts from
BEFORE_RL = ("tiny", "sft", "distill")  # commands that train without a reward


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
    end: str = ""  # kind of the merged end of a line

    @property
    def key(self) -> tuple[object, ...]:
        """The identity of a point: equal keys are the same point.

        A run or a merge with the weights of the SFT policy is a separate point: it shows that nothing was learned.
        """
        return (self.kind == "sft", *(model.digest for model in self.models), self.eta)

    @property
    def whole(self) -> Weights | None:
        """The model that the point is: a policy, or the end of the line where the point is one; else None."""
        if self.eta is None:
            return self.models[0]
        return {0.0: self.models[0], 1.0: self.models[-1]}.get(self.eta)

    @property
    def labels(self) -> JsonObject:
        """Kind, title, kind of the end, iteration and eta, as they are in front.json."""
        more = {name: value for name, value in (("title", self.title), ("end", self.end)) if value}
        return {"kind": self.kind, **more, "iteration": self.iteration, "eta": self.eta}


def plan_candidates(config: ParetoConfig, progress: Progress = SILENT) -> list[Candidate]:
    """Every point of the front in the order of measuring, each once."""
    start = Weights.of(config.sft)
    others = [Weights.of(path) for path in config.policies if path.resolve() != config.sft.resolve()]
    before = before_rl(start, others)
    candidates = [Candidate("sft", (start,), title=title_of(config.sft, "SFT"))]
    for model in others:
        kind = kind_of(model.path, model.digest in before - {start.digest})
        if model.digest == start.digest and kind == "policy" and command_of(model.path) != "rlhf":
            kind = "sft"
        title = title_of(model.path, "base") if kind == "base" else ""
        candidates.append(Candidate(kind, (model,), iteration_of(model.path), title=title))
    if config.merged is not None:
        ends = Weights.of(config.init or config.sft), Weights.of(config.merged)
        iteration, end = iteration_of(config.merged), kind_of(config.merged, False)
        candidates += [Candidate("line", ends, iteration, eta, end=end) for eta in sorted(set(config.etas))]
    found: dict[tuple[object, ...], Candidate] = {}
    for candidate in candidates:
        first = found.setdefault(candidate.key, candidate)
        if first.models[0].path.resolve() != candidate.models[0].path.resolve():
            progress.note(f"{candidate.models[0].path} has the weights of {first.models[0].path}: they are one point")
    return list(found.values())


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
    return {"sft": "SFT", "distill": "distilled"}.get(command_of(path), otherwise)


def command_of(path: Path) -> str:
    """The command that wrote a model; "" without a manifest."""
    return str((read_manifest(path) or {}).get("command") or "")


def before_rl(start: Weights, others: Sequence[Weights]) -> set[str]:
    """Digests of the models from before RL: those made by `BEFORE_RL` from none of the other given models, and the
    recorded parents of these and of the SFT policy. Only manifests of the given models are read."""
    manifests = {model.digest: read_manifest(model.path) or {} for model in (*others, start)}
    trained = {digest for digest, own in manifests.items() if own.get("command", "tiny") not in BEFORE_RL}
    after = {start.digest, *trained}
    for _ in manifests:  # a model that was made from one after the start is after it too, whatever made it
        after |= {digest for digest, own in manifests.items() if parents_of(own) & after}
    found = {start.digest, *(d for d, own in manifests.items() if own.get("command") in BEFORE_RL and d not in after)}
    waiting = list(found)
    while waiting:
        above = parents_of(manifests.get(waiting.pop(), {})) - found
        found |= above
        waiting += above
    return found


def parents_of(manifest: Manifest) -> set[str]:
    """Digests of the weights from which a model was trained."""
    return {parent["weights"] for parent in manifest.get("parents", []) if parent.get("role") in TRAINED_FROM}


def kind_of(path: Path, before: bool) -> str:
    """The kind of a model by its own manifest: the method of a merge, else base or policy.

    before  whether the model is from before RL

    A linear merge of one model without a base writes that model, or the model of an adapter: it merges nothing. A point
    that was picked from a front is what it was there; one of a line is a merge by LITI.
    """
    manifest = read_manifest(path) or {}
    command = str(manifest.get("command") or "")
    if command == "pick":
        kind = str((manifest.get("summary") or {}).get("kind", ""))
        return "liti" if kind == "line" else kind if kind in METHODS else "policy"
    method = command.removeprefix("merge ")
    inputs = [parent.get("role") for parent in manifest.get("parents", [])]
    if method != command and method in METHODS and inputs != ["input"]:
        return method
    return "base" if before else "policy"
