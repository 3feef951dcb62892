"""Two results of one task, row by row: which rows both have, what the comparison is, and how it is said.

Rows are joined by their id; a row that only one result has is counted, not compared. In a task with groups (the
subjects of MMLU) the rows are clustered by them, and the difference of the groups' means is given besides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject

from .paired import Comparison, Pairs, compare

__all__ = ["Scored", "as_json", "compare_scored", "comparison_lines", "sentence"]

SMALL_P = 0.0001


@dataclass
class Scored:
    """One value per row of one result, in the order of its rows.

    prompts  digest of what each row asked: rows whose digests differ are compared, and counted
    """

    values: dict[str, float] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Iterable[JsonMapping], metric: str) -> Scored:
        """From the lines of samples/TASK.jsonl: `id`, perhaps `group`, the metric itself or in `correct`, a digest."""
        found = cls()
        for sample in samples:
            value = sample.get("correct", sample).get(metric)
            if value is None:
                continue
            name = str(sample["id"])
            found.values[name] = float(value)
            found.groups[name] = str(sample.get("group") or "")
            found.prompts[name] = str(sample.get("prompt_ids_hash") or sample.get("ids_hash") or "")
        return found


def compare_scored(
    ours: Scored, theirs: Scored, what: str = "task", weights: Mapping[str, float] | None = None
) -> JsonObject:
    """The comparison of the rows that both have, as JSON. Raises InputError without one.

    weights: of the rows in the mean, by id; None: equal
    """
    ids = [name for name in ours.values if name in theirs.values]
    if not ids:
        raise InputError(
            f"{what}: the two results have no row in common",
            "compare results of the same data, of rows with the same ids",
        )
    groups = [ours.groups.get(name, "") for name in ids]
    grouped = any(groups)
    found = as_json(
        compare(
            Pairs.of(
                ids,
                [ours.values[name] for name in ids],
                [theirs.values[name] for name in ids],
                groups if grouped else (),
                None if weights is None else [weights[name] for name in ids],
            )
        )
    )
    if grouped and weights is None:
        found["by_groups"] = _mean_of_groups(ids, groups, ours, theirs)
    return {
        **found,
        "only_ours": len(ours.values) - len(ids),
        "only_theirs": len(theirs.values) - len(ids),
        "other_prompts": sum(ours.prompts.get(name) != theirs.prompts.get(name) for name in ids),
    }


def _mean_of_groups(ids: Sequence[str], groups: Sequence[str], ours: Scored, theirs: Scored) -> JsonObject:
    """The same with each group counting alike."""
    sizes = Counter(groups)
    found = compare(
        Pairs.of(
            ids,
            [ours.values[name] for name in ids],
            [theirs.values[name] for name in ids],
            groups,
            [1 / sizes[group] for group in groups],
        )
    )
    whole = as_json(found)
    return {key: whole[key] for key in ("ours", "theirs", "difference", "low", "high", "p", "test", "found")}


def as_json(comparison: Comparison) -> JsonObject:
    """The entries of a comparison; an end of an interval that is unknown is None."""
    found: JsonObject = asdict(comparison)
    for name in ("low", "high"):
        found[name] = found[name] if math.isfinite(found[name]) else None
    for name in ("first_gained", "first_lost"):
        found[name] = list(found[name])
    return found


def sentence(found: JsonMapping, unit: str = "points", scale: float = 100.0, higher_is_better: bool = True) -> str:
    """A comparison in one line: better, worse, or no difference found with the rows that would be needed."""
    digits = 1 if scale > 1 else 3
    difference = scale * found["difference"]
    ends = (
        ""
        if found["low"] is None
        else f"95 %: {scale * found['low']:+.{digits}f} to {scale * found['high']:+.{digits}f}; "
    )
    p = f"p {'< ' if found['p'] < SMALL_P else '= '}{max(found['p'], SMALL_P):.{4 if found['p'] < 0.001 else 3}f}"
    flipped = f"{found['gained']:,} rows up, {found['lost']:,} down of {found['n']:,}"
    if found["found"]:
        verdict = "better" if (difference > 0) == higher_is_better else "worse"
        return f"{verdict} by {abs(difference):.{digits}f} {unit} ({ends}{p}; {flipped})"
    if difference == 0 and not (found["gained"] or found["lost"]):
        return f"equal on all {found['n']:,} rows"
    needed = (
        ""
        if found["rows_needed"] is None
        else f"; {_about(found['rows_needed'])} rows would be needed for this difference"
    )
    reach = scale * found["detectable"]
    least = f"; these find {reach:.{digits}f} {unit} or more" if reach else ""
    return f"no difference found: {difference:+.{digits}f} {unit} ({ends}{p}; {flipped}){needed}{least}"


def comparison_lines(document: JsonMapping) -> Iterator[str]:
    """A comparison of results in words: a line per task, the flipped rows, the rows that only one result has."""
    compared: Mapping[str, JsonMapping] = document.get("compared", {})
    if not compared:
        return
    yield f"Against {document['against']['name']}{_other_size(document)}, row by row:"
    for name, found in compared.items():
        title = document["tasks"].get(name, {}).get("title", name)
        clusters = f", {found['clusters']} subjects" if found["clusters"] < found["n"] else ""
        unit, scale = ("points", 100.0) if found["higher_is_better"] else ("nats per token", 1.0)
        yield f"  {title} ({found['metric']}{clusters}): {sentence(found, unit, scale, found['higher_is_better'])}"
        if mean := found.get("by_groups"):
            ends = f" (95 %: {100 * mean['low']:+.1f} to {100 * mean['high']:+.1f})" if mean["low"] is not None else ""
            yield f"    mean of the subjects: {100 * mean['difference']:+.1f} points{ends}"
        for word, key in (("up", "first_gained"), ("down", "first_lost")):
            if found[key]:
                yield f"    first {word}: {', '.join(found[key])}"
        for key, words in (
            ("only_ours", "rows only here"),
            ("only_theirs", "rows only there"),
            ("other_prompts", "rows with another prompt there"),
        ):
            if found[key]:
                yield f"    {found[key]:,} {words}"
    if document.get("not_compared"):
        yield f"  only in one of the two: {', '.join(document['not_compared'])}"


def _other_size(document: JsonMapping) -> str:
    """That the other model has another shape, in words; nothing where it has the same, or one is unknown."""
    ours, theirs = (document.get(key, {}).get("shape") for key in ("model", "against"))
    if not ours or not theirs or ours == theirs:
        return ""
    here, there = (
        document[key].get("size") or f"hidden {shape[0]}, {shape[1]} layers"
        for key, shape in (("model", ours), ("against", theirs))
    )
    return f" (another size: {there}, here {here})"


def _about(rows: int) -> str:
    """A number of rows to two digits."""
    digits = max(0, len(str(rows)) - 2)
    return f"about {math.ceil(rows / 10**digits) * 10**digits:,}"
