"""`gemma2 doctor --fix`: a new directory with what is mechanical put right; the weights are links to the same files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.errors import InputError, OutputError
from gemma2.core.json_files import JsonObject, write_json
from gemma2.core.outputs.manifest import now, versions, write_manifest
from gemma2.core.outputs.promised import promise
from gemma2.core.outputs.safetensors_header import PAGE_BYTES, Tensor
from gemma2.core.outputs.staging import staged_output
from gemma2.merging.inputs.weight_files import INDEX, WEIGHTS, companions
from gemma2.posttrain.data.chat import GEMMA_TEMPLATE

from .checks.stop_checks import turn_ids
from .checks.subject import ADAPTER, OUTPUT, REWARD, Subject
from .checks.weight_file_checks import metadata_format

__all__ = ["Repair", "repair"]

GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass
class Repair:
    """What was changed, each in one line, and where."""

    out: Path
    changed: list[str] = field(default_factory=list)


def repair(path: Path, out: Path, force: bool = False) -> Repair:
    """Write a copy of a model directory in which is right what needs no judgement.

    Put right: generation config (stop ids, no max_length), chat template, post-processor, pad, model_max_length,
    `format: pt` in the headers, the index. Not touched: weights, config.json. Files that stay as they are are hard
    links where the disk allows, else copies.
    Raises InputError for what is not a model directory, OutputError for an `out` that cannot be written.
    """
    subject = Subject(path)
    if subject.kind in (ADAPTER, OUTPUT) or not subject.tensors or subject.header_faults:
        raise InputError(f"{path} is not a model whose weights can be read", "gemma2 doctor names what is wrong")
    promise(out)
    done = Repair(out)
    with staged_output(out, force=force) as partial:
        for file in (*companions(path), *subject.weights):
            _link(file, partial / file.name)
        for change in (_generation, _tokenizer, _headers, _index):
            done.changed += change(subject, partial)
        parents = [{"role": "model", "path": os.path.relpath(path, out)}]
        written = {"command": "doctor --fix", "parents": parents, "versions": versions(), "ended": now()}
        write_manifest(partial, {**written, "status": "complete", "summary": {"changed": done.changed}})
    return done


def _link(source: Path, target: Path) -> None:
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:  # another disk, or one without links
        try:
            shutil.copyfile(real, target)
        except OSError as error:
            raise OutputError(f"{target} cannot be written ({error.strerror})", "free some room") from error


def _replace(partial: Path, name: str, value: JsonObject) -> None:
    """Write a JSON file of the copy; the link to the original is dropped first."""
    (partial / name).unlink(missing_ok=True)
    write_json(partial / name, value)


def _generation(subject: Subject, partial: Path) -> Iterator[str]:
    if subject.kind == REWARD or not subject.is_gemma2:
        return
    settings = dict(subject.json(GENERATION))
    before = json.dumps(settings, sort_keys=True)
    stops = sorted(turn_ids(subject).values())
    if stops:
        settings["eos_token_id"] = stops
    for key, token in (("bos_token_id", "<bos>"), ("pad_token_id", "<pad>")):
        if (i := _added(subject).get(token)) is not None:
            settings[key] = i
    settings.pop("max_length", None)
    if json.dumps(settings, sort_keys=True) != before:
        _replace(partial, GENERATION, settings)
        yield f"{GENERATION}: stops {stops}, no max_length"


def _added(subject: Subject) -> Mapping[str, int]:
    added = subject.json("tokenizer.json").get("added_tokens")
    rows = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    return {str(one["content"]): one["id"] for one in rows if isinstance(one.get("id"), int) and "content" in one}


def _tokenizer(subject: Subject, partial: Path) -> Iterator[str]:
    added = _added(subject)
    if not subject.is_gemma2 or not {"<bos>", "<pad>", "<eos>"} <= added.keys():
        return
    yield from _post_processor(subject, partial, added["<bos>"])
    settings = dict(subject.json(TOKENIZER_CONFIG))
    context = subject.number("max_position_embeddings") or 8192
    had = settings.get("chat_template") is not None or (partial / "chat_template.jinja").is_file()
    if had and {"<start_of_turn>", "<end_of_turn>"} <= added.keys() and _template_of(subject) != GEMMA_TEMPLATE:
        settings.pop("chat_template", None)
        (partial / "chat_template.jinja").unlink(missing_ok=True)
        (partial / "chat_template.jinja").write_text(GEMMA_TEMPLATE, encoding="utf-8")
        yield "the chat template is Gemma 2's"
    if _content(settings.get("pad_token")) in ("", _content(settings.get("eos_token"))):
        settings["pad_token"] = "<pad>"
        yield "padding is <pad>"
    length = settings.get("model_max_length")
    if isinstance(length, int | float) and length < context:
        settings["model_max_length"] = context
        yield f"model_max_length is {context}"
    if settings != subject.json(TOKENIZER_CONFIG):
        _replace(partial, TOKENIZER_CONFIG, settings)


def _template_of(subject: Subject) -> str | None:
    return subject.tokenizer.chat_template if subject.tokenizer is not None else None


def _content(token: object) -> str:
    """A token of tokenizer_config.json: a text, or an object with its text."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _post_processor(subject: Subject, partial: Path, bos: int) -> Iterator[str]:
    """`<bos>` before every text, once."""
    tokenizer = subject.tokenizer
    if tokenizer is not None and tokenizer.encode("A plain text.").count(bos) == 1:
        return
    whole = dict(subject.json("tokenizer.json"))
    start, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, *second],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
    }
    _replace(partial, "tokenizer.json", whole)
    yield "tokenizer.json puts one <bos> before a text"


def _headers(subject: Subject, partial: Path) -> Iterator[str]:
    """State `format: pt`. The data is copied: a header of another length moves it."""
    for file in subject.weights:
        if metadata_format(file) == "pt":
            continue
        target = partial / file.name
        target.unlink()
        with file.open("rb") as source, target.open("wb") as written:
            length = int.from_bytes(source.read(8), "little")
            entries = json.loads(source.read(length))
            metadata = entries.get("__metadata__")
            entries["__metadata__"] = {**(metadata if isinstance(metadata, dict) else {}), "format": "pt"}
            text = json.dumps(entries, separators=(",", ":")).encode()
            padded = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
            written.write(padded.to_bytes(8, "little") + text.ljust(padded))
            shutil.copyfileobj(source, written, 1 << 22)
        yield f"{file.name} says format pt"


def _index(subject: Subject, partial: Path) -> Iterator[str]:
    """An index that says what the shards hold."""
    files = {tensor.file.name for tensor in subject.tensors.values()}
    single = files == {WEIGHTS}
    if single:
        return
    total = sum(tensor.nbytes for tensor in subject.tensors.values())
    places = {name: _place(tensor) for name, tensor in sorted(subject.tensors.items())}
    index = subject.json(INDEX)
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if index.get("weight_map") == places and stated == total:
        return
    (partial / INDEX).unlink(missing_ok=True)
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    yield f"{INDEX} names what the shards hold"


def _place(tensor: Tensor) -> str:
    return tensor.file.name
