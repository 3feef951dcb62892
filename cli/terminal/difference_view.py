"""Differences on a terminal: of one stage and its record, and of two runs, both values in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gemma2.core.json_files import JsonMapping
from gemma2.core.sizes import size
from gemma2.posttrain.provenance.change import shown

from .console import Console

__all__ = ["show_explanations", "show_run_differences"]


def show_explanations(stages: Sequence[JsonMapping], console: Console) -> None:
    """Print of every stage what differs, or what it was made from."""
    for number, stage in enumerate(stages):
        console.text(("\n" if number else "") + f"{stage['stage']}: {stage['status']}  ({stage['command']})")
        changes = [*stage["differences"], *stage["versions"]]
        valued = [one for one in changes if (one["was"], one["now"]) != (None, None)]
        if valued:
            console.table(
                [{"what": one["what"], "recorded": in_full(one["was"]), "now": in_full(one["now"])} for one in valued]
            )
        for line in (*(one["what"] for one in changes if one not in valued), *stage["notes"]):
            console.text(f"  {line}")
        if stage["status"] == "complete" and stage["made_from"]:
            console.table([*_origin(stage["made_from"])])


def _origin(made: JsonMapping) -> Iterator[dict[str, str]]:
    """Rows of what an output was made from."""
    yield {"made from": "hash", "value": made["hash"]}
    for key, value in made["settings"].items():
        yield {"made from": f"setting {key}", "value": in_full(value)}
    for parent in made["parents"]:
        place = f"{parent.get('role')} {parent.get('hub') or parent.get('path')}"
        yield {"made from": f"weights of {place}", "value": in_full(parent.get("weights"))}
        for name, digest in (parent.get("files") or {}).items():
            yield {"made from": f"{name} of {place}", "value": in_full(digest)}
    for source in made["data"]:
        yield {
            "made from": f"{source.get('role', 'data')} {source.get('path')}",
            "value": in_full(source.get("digest")),
        }
    for modules in made["code"].values():
        for module, digest in modules.items():
            yield {"made from": f"code of {module}", "value": in_full(digest)}
    for package, version in made["versions"].items():
        yield {"made from": f"version of {package}", "value": in_full(version)}


def in_full(value: object) -> str:
    """A value, uncut: of a file its size and digest, of a list an entry per line."""
    if isinstance(value, Mapping) and value.keys() == {"size", "digest"}:
        amount = size(value["size"]) if isinstance(value["size"], int) else shown(value["size"])
        return f"{amount}, {value['digest'] or 'without a digest'}"
    if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return shown(value, None)


def show_run_differences(document: JsonMapping, console: Console) -> None:
    """Print how two runs differ: a table of the stages that do, then of each what differs, and its figures."""
    first, second = document["runs"]
    states = [one["state"] for one in document["stages"]]
    differing = [one for one in document["stages"] if one["state"] != "same"]
    if differing:
        keys = ["stage", "command", "state", *(["note"] if any(one["note"] for one in differing) else [])]
        console.table([{key: one[key] for key in keys} for one in differing])
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.text(f"{len(states)} {'stages' if len(states) > 1 else 'stage'}: {counts}")
    for one in differing:
        rows = [
            {"what": row["what"], first: in_full(row["a"]), second: in_full(row["b"])} for row in one["differences"]
        ]
        figures = [{"figure": row["figure"], first: row["a"], second: row["b"]} for row in one["summary"]]
        if rows or figures:
            console.text(f"\n{one['stage']}: {one['state']}")
        if rows:
            console.table(rows)
        if figures:
            console.table(figures)
