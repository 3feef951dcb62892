"""The lineage of a run as a graph of its stages, and as a table. Pure.

An edge is a parent or a data file that a manifest records; for a stage without a manifest, a need that pipeline.json
records. A parent outside the run gets its own box.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from gemma2.core.json_files import JsonMapping, JsonObject

from .collect import Collected, RecordedStage, name_of
from .graph.render import Edge, Node, dag_svg
from .plots.values import short_hash
from .sections import anchor_of

__all__ = ["family", "lineage"]

LEFT_OUT = ("warp", "quickstart", "pipeline")  # outputs that only hold others


def family(found: Collected) -> dict[str, str] | None:
    """The graph in its wide and its narrow form; None if no stage has a parent."""
    stages = {stage.name: stage for stage in found.stages if stage.command not in LEFT_OUT}
    edges = list(dict.fromkeys(edge for stage in stages.values() for edge in edges_of(stage, stages)))
    if not edges:
        return None
    used = {name for edge in edges for name in (edge.source, edge.target)}
    prefix = shared_folder(stages)
    nodes = [
        Node(
            name,
            called(name, prefix, found),
            " ".join(filter(None, (stage.command, short_hash(stage.weights)[:7]))),
            stage.status,
            "\n".join(filter(None, (stage.weights or "", stage.error))),
            f"#{anchor_of(found, name)}",
        )
        for name, stage in stages.items()
        if name in used
    ]
    nodes += [Node(name, PurePosixPath(name).name or name, "outside this run", "") for name in used - stages.keys()]
    nodes.sort(key=lambda node: (node.id in stages, list(stages).index(node.id) if node.id in stages else 0, node.id))
    return {form: dag_svg(nodes, edges, narrow=form == "narrow", page=f"family-{form}") for form in ("wide", "narrow")}


def edges_of(stage: RecordedStage, stages: Mapping[str, RecordedStage]) -> Iterator[Edge]:
    """Yield the edges from the recorded sources of a stage, or if none is recorded, from the stages that it needs."""
    recorded = False
    for source, role in sources(stage):
        owner = owner_of(source, stages)
        if owner != stage.name and (owner in stages or role[0] == "parent"):
            recorded = True
            yield Edge(owner, stage.name, role[1])
    holder = owner_of(str(PurePosixPath(stage.name).parent), stages)
    if holder in stages:  # the models that `tiny` puts into one output
        yield Edge(holder, stage.name, "part")
    needs = () if recorded else stage.record.get("needs") or ()
    for name in needs:
        if name in stages:
            yield Edge(name, stage.name)


def sources(stage: RecordedStage) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (path below the report's directory, ("parent" or "data", role)) of every source that a manifest records."""
    for parent in records(stage, "parents"):
        if parent.get("hub"):
            yield str(parent["hub"]), ("parent", str(parent.get("role", "")))
        else:
            yield placed(stage, parent), ("parent", str(parent.get("role", "")))
    for source in records(stage, "data"):
        name = PurePosixPath(str(source.get("path", ""))).stem
        yield placed(stage, source), ("data", "data" if name.startswith("data-") else name)


def records(stage: RecordedStage, key: str) -> list[JsonMapping]:
    found = stage.manifest.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def placed(stage: RecordedStage, record: JsonMapping) -> str:
    """The final form of a recorded path, relative to the report's directory."""
    return name_of(os.path.normpath(os.path.join(stage.name, str(record.get("path", "")))))


def owner_of(path: str, stages: Mapping[str, RecordedStage]) -> str:
    """The name of the stage that contains a path, or the path itself if no stage does."""
    place = PurePosixPath(path)
    return next(
        (str(folder) for folder in (place, *place.parents) if str(folder) in stages and str(folder) != "."), path
    )


def shared_folder(stages: Mapping[str, RecordedStage]) -> str:
    """The folder of WARP's stages, such as `warp/`, left out of their names; "" unless there is exactly one."""
    inside = {name[: name.index("iteration-")] for name in stages if "iteration-" in name}
    return inside.pop() if len(inside) == 1 else ""


def called(name: str, prefix: str, found: Collected) -> str:
    """The name of a stage in its box."""
    if name == ".":
        return found.title
    short = name.removeprefix(prefix)
    return name if any(stage.name == short for stage in found.stages) else short


def lineage(found: Collected) -> list[JsonObject]:
    """Rows of the table: a result with its weights, and its parents with the weights that were used."""
    owners = {stage.weights: stage.name for stage in reversed(found.stages) if stage.weights}
    rows = []
    for stage in found.stages:
        parents = records(stage, "parents")
        if not stage.weights and not parents:
            continue
        described = [
            {
                "role": str(parent.get("role", "")),
                "name": owners.get(str(parent.get("weights"))) or PurePosixPath(str(parent.get("path", ""))).name,
                "weights": str(parent.get("weights", "")),
            }
            for parent in parents
        ]
        unique = {(parent["role"], parent["weights"]): parent for parent in described}
        name = found.title if stage.name == "." else stage.name
        rows.append({"name": name, "weights": stage.weights, "parents": list(unique.values())})
    return rows
