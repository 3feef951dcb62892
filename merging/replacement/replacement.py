"""A model with another tokenizer: embedding and untied head get a row for each token of the new tokenizer.

The rows are those of `row_sources`; means are taken in fp64 and rounded once to the dtype of the model. All other
tensors are copied. Memory holds one table of rows as it is stored.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

from gemma2.core.errors import InputError
from gemma2.core.foreign.links import refuse_outside_links
from gemma2.core.json_files import JsonMapping, JsonObject, read_json
from gemma2.core.outputs.ancestry import write_card
from gemma2.core.outputs.digests import digest_input
from gemma2.core.outputs.hub import locate_model
from gemma2.core.outputs.manifest import Manifest, now, versions, write_manifest
from gemma2.core.outputs.model_identity import identity_of, parent_record
from gemma2.core.outputs.safetensors_header import ITEM_BYTES, printable, weight_files
from gemma2.core.outputs.staging import check_output, check_space, staged_output
from gemma2.core.progress import SILENT, Progress
from gemma2.merging.inputs.checkpoint import COMPANIONS, Checkpoint, Reader
from gemma2.merging.inputs.compatibility import check_model
from gemma2.merging.inputs.families import is_decoder
from gemma2.merging.inputs.output_heads import tied_copies
from gemma2.merging.inputs.resolve import open_input
from gemma2.merging.inputs.weight_files import companions
from gemma2.merging.kernels.dense import check_sum
from gemma2.merging.kernels.dtypes import narrow, widen
from gemma2.merging.kernels.native import announced
from gemma2.merging.kernels.number_formats import KINDS, Bytes, Doubles, Floats
from gemma2.merging.streaming.failures import no_empty_parents, system_refusals
from gemma2.merging.streaming.read_back import ReadBack
from gemma2.merging.streaming.writer import Writer, copy_companions
from gemma2.merging.tokenizers.row_map import embedding_rows, vocabulary_tensors

from .row_sources import RowSources, ids_of, read_tokenizer, row_sources

__all__ = ["ReplacePlan", "plan_replacement", "replace_tokenizer"]

PIECE = 1 << 20  # elements
ROWS = 1024
GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"
TOKEN_ID = "_token_id"


@dataclass(frozen=True, kw_only=True)
class ReplacePlan:
    """A replacement that was checked. layout: dtype and shape of the output's tensors; tables: those with a row per id.

    config, generation  keys that change
    """

    model: Checkpoint
    donor: Path
    out: Path
    sources: RowSources
    tables: frozenset[str]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    config: JsonMapping
    generation: JsonMapping
    notes: tuple[str, ...] = field(default=())

    def summary(self) -> JsonObject:
        """Return what manifest, card, `--json` and a dry run show."""
        return {
            "rows": len(self.sources.rows),
            "rows_before": embedding_rows(self.model),
            **self.sources.counts,
            "old_tokens_per_averaged_one": round(self.sources.pieces, 2),
            "method": "mean of the rows of the old tokens that the text of a new token is cut into",
            "tables": sorted(self.tables),
            "notes": list(self.notes),
        }


def plan_replacement(model: Path, tokenizer: Path, out: Path, force: bool = False) -> ReplacePlan:
    """Check a replacement from headers and tokenizers. Raises InputError or OutputError; writes nothing."""
    found = open_input(model, "model")
    if found.path != found.origin:
        raise InputError(f"{found} is an adapter", "merge it first: gemma2 merge linear MODEL+ADAPTER --out MERGED")
    check_model(found)
    if not is_decoder(found):
        raise InputError(f"{found} is not a decoder of text: other tensors have a row per token too", "give a decoder")
    donor = locate_model(tokenizer, "tokenizer")
    if not donor.is_dir():
        raise InputError(f"--tokenizer {donor} is not a directory", "give a model or tokenizer directory, or a hub id")
    old, new = read_tokenizer(found.path, "model"), read_tokenizer(donor, "tokenizer")
    sources = row_sources(old, new, embedding_rows(found))
    tables = vocabulary_tensors(found)
    layout = {}
    for name, tensor in found.tensors.items():
        if name not in tied_copies(found):
            rows = (len(sources.rows), *tensor.shape[1:]) if name in tables else tensor.shape
            layout[name] = tensor.dtype, rows
    owners = _owners(donor, ids_of(new))
    names = {index: token for token, index in ids_of(old).items()}
    generation = found.path / GENERATION
    changed, notes = _token_ids(found.config, owners, names, ids_of(new))
    plan = ReplacePlan(
        model=found,
        donor=donor,
        out=out,
        sources=sources,
        tables=frozenset(tables & layout.keys()),
        layout=layout,
        config={"vocab_size": len(sources.rows), **changed},
        generation=_token_ids(read_json(generation), owners, names, ids_of(new))[0] if generation.is_file() else {},
        notes=(*notes, *_template(found.path, donor)),
    )
    check_output(out, force, {"model": found.path, "tokenizer": donor})
    check_space(out, sum(prod(shape) * ITEM_BYTES[dtype] for dtype, shape in layout.values()))
    return plan


def replace_tokenizer(
    model: Path, tokenizer: Path, *, out: Path, force: bool = False, progress: Progress = SILENT
) -> ReplacePlan:
    """Write `model` with the tokenizer of the directory `tokenizer` to `out`.

    Raises InputError or OutputError, if possible before any work.
    """
    with system_refusals(out), ExitStack() as stack:
        plan = plan_replacement(model, tokenizer, out, force)
        for line in plan.notes:
            progress.note(line)
        started = now()
        stack.enter_context(announced(progress.note))
        stack.enter_context(no_empty_parents(out))
        directory = stack.enter_context(staged_output(out, force))
        copy_companions(plan.model.path, directory, plan.config)
        _write_tokenizer(plan, directory)
        digests = _write_weights(plan, directory, progress)
        manifest = _manifest(plan, started)
        write_card(directory, manifest, out)
        write_manifest(directory, manifest, {file.name: digests.get(file.name) for file in weight_files(directory)})
    return plan


# --- token ids and files ----------------------------------------------------------------------------------------------


def _owners(donor: Path, ids: Mapping[str, int]) -> JsonObject:
    """Return the ids that the new tokenizer's own model gives bos, eos, ...: from its files, as far as they say."""
    found: JsonObject = {}
    if (donor / SETTINGS).is_file():
        for key, value in read_json(donor / SETTINGS).items():
            token = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(token, str) and token in ids:
                found[f"{key}_id"] = ids[token]
    for name in ("config.json", GENERATION):
        if (donor / name).is_file():
            stated = read_json(donor / name)
            found |= {key: value for key, value in stated.items() if key.endswith(TOKEN_ID) and value is not None}
    return found


def _token_ids(
    config: JsonMapping, owners: JsonMapping, names: Mapping[int, str], ids: Mapping[str, int]
) -> tuple[JsonObject, list[str]]:
    """Return the keys that hold ids of tokens and change: each follows its token, else is the new tokenizer's own."""
    changed: JsonObject = {}
    notes = []
    for key, value in config.items():
        listed = value if isinstance(value, list) else [value]
        if not key.endswith(TOKEN_ID) or any(type(item) is not int for item in listed):
            continue
        kept = [ids[names[item]] for item in listed if names.get(item) in ids]
        meant = owners.get(key) if not kept else kept if isinstance(value, list) else kept[0]
        if not kept:
            lost = ", ".join(printable(names.get(item, str(item))) for item in listed)
            notes.append(f"{key}: the new tokenizer has no {lost}; it is {meant} now")
        if meant != value:
            changed[key] = meant
    return changed, notes


def _template(model: Path, donor: Path) -> list[str]:
    """Return a note if the chat template of the model goes with its tokenizer, and another or none comes."""

    def has_one(folder: Path) -> bool:
        inside = (folder / SETTINGS).is_file() and bool(read_json(folder / SETTINGS).get("chat_template"))
        return inside or any((folder / f"chat_template.{end}").is_file() for end in ("jinja", "json"))

    if has_one(model) and not has_one(donor):
        return ["no chat template: that of the model goes with its tokenizer, and the new one brings none"]
    return ["the chat template is that of the new tokenizer"] if has_one(donor) else []


def _write_tokenizer(plan: ReplacePlan, directory: Path) -> None:
    """Replace the tokenizer's files, and the ids in generation_config.json."""
    refuse_outside_links(plan.donor, COMPANIONS)
    for name in COMPANIONS:
        if name not in ("config.json", GENERATION):
            (directory / name).unlink(missing_ok=True)
            if (plan.donor / name).is_file():
                shutil.copyfile(plan.donor / name, directory / name)
    if plan.generation:
        text = json.dumps(read_json(directory / GENERATION) | dict(plan.generation), indent=2, ensure_ascii=False)
        (directory / GENERATION).write_text(text + "\n", encoding="utf-8")


def _manifest(plan: ReplacePlan, started: str) -> Manifest:
    return {
        "command": "merge replace-tokenizer",
        "config": {},
        "parents": [parent_record("model", plan.model.path, identity_of(plan.model.path), plan.out)],
        "data": [
            {
                "role": "tokenizer",
                "path": os.path.relpath(path.resolve(), plan.out.resolve()),
                "digest": digest_input(path),
            }
            for path in companions(plan.donor)
        ],
        "versions": versions(),
        "started": started,
        "ended": now(),
        "status": "complete",
        "summary": plan.summary(),
    }


# --- weights ----------------------------------------------------------------------------------------------------------


def _write_weights(plan: ReplacePlan, directory: Path, progress: Progress) -> dict[str, str]:
    """Write all tensors, read them back, and return the digest of each file."""
    total = 2 * sum(prod(shape) * ITEM_BYTES[dtype] for dtype, shape in plan.layout.values())
    sums: dict[str, int] = {}
    with (
        Reader.open([plan.model]) as reader,
        progress.task("replace-tokenizer", total=total, unit="bytes") as task,
        Writer.create(directory, plan.layout) as writer,
        ReadBack(directory, task) as follower,
    ):
        follower.start()
        for name in plan.layout:
            begin = 0
            for piece in _rows(plan, name, reader) if name in plan.tables else _copied(plan, name, reader):
                writer.write(name, begin, piece)
                place = writer.places[name].offset + begin
                sums[name] = (sums.get(name, 0) + int(check_sum(piece, place))) % 2**64
                begin += piece.size
                task.advance(piece.size)
            follower.wrote(name, begin)
        return follower.finish(plan.layout, sums)


def _copied(plan: ReplacePlan, name: str, reader: Reader) -> Iterator[Bytes]:
    """Yield a tensor as it is stored."""
    tensor = plan.model.tensors[name]
    for first in range(0, tensor.count, PIECE):
        count = min(PIECE, tensor.count - first)
        raw = np.empty(count * ITEM_BYTES[tensor.dtype], np.uint8)
        reader.read(tensor, first, count, raw)
        yield raw


def _rows(plan: ReplacePlan, name: str, reader: Reader) -> Iterator[Bytes]:
    """Yield the rows of a table for the new tokens, ROWS at a time."""
    tensor = plan.model.tensors[name]
    kind, item = KINDS[tensor.dtype], ITEM_BYTES[tensor.dtype]
    raw = np.empty(tensor.nbytes, np.uint8)
    reader.read(tensor, 0, tensor.count, raw)
    table = raw.reshape(tensor.shape[0], -1)

    def values(rows: list[int]) -> Floats:
        chosen = np.ascontiguousarray(table[rows]).reshape(-1)
        found = np.empty(chosen.size // item, np.float32)
        widen(chosen, kind, found)
        return found.reshape(len(rows), -1)

    known = plan.sources.known
    mean = _mean((values(list(known[at : at + ROWS])) for at in range(0, len(known), ROWS)), table.shape[1] // item)
    if not np.isfinite(mean).all():
        raise InputError(f"{plan.model}: {printable(name)} holds NaN or Inf", "give an earlier checkpoint")
    for begin in range(0, len(plan.sources.rows), ROWS):
        part = plan.sources.rows[begin : begin + ROWS]
        found = np.tile(mean.astype(np.float32), (len(part), 1))
        for at, rows in enumerate(part):
            if rows:
                found[at] = values(list(rows)).mean(0, dtype=np.float64)
        out = np.empty(found.size * item, np.uint8)
        narrow(found.reshape(-1), kind, out)
        yield out


def _mean(parts: Iterable[Floats], width: int) -> Doubles:
    """Return the mean of all rows, fp64; zero without rows."""
    total, count = np.zeros(width), 0
    for part in parts:
        total += part.sum(0, dtype=np.float64)
        count += len(part)
    return total / max(count, 1)
