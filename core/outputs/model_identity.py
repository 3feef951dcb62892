"""What a model is: its tensors, and every other file of its directory that decides what it computes or how it is asked.

Everything counts unless it is known to be harmless: a file that this module has never heard of is part of the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from pathlib import Path

from .digest_cache import remembered
from .digests import digest_input, digest_weights
from .hashing import digest_name, hasher
from .hub import SNAPSHOT
from .manifest import MANIFEST, STATE, ParentRecord
from .safetensors_header import weight_files

__all__ = [
    "CONFIGS",
    "INCIDENTAL_KEYS",
    "ModelIdentity",
    "as_digests",
    "deciding_files",
    "digest_model",
    "identity_of",
    "parent_record",
    "settings_in",
]

# For people, or records of how a model was made: nothing that loads it reads them.
FOR_PEOPLE = (
    *("README*", "*.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "*.pdf", "*.html"),
    *("*.png", "*.svg", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.csv"),
    *("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "skipped.jsonl", "dropped.jsonl"),
    *("training_args.*", "trainer_state.json", "optimizer.*", "scheduler.*", "rng_state*", "*_results.json"),
    *("events.out.tfevents*", "mergekit_config.y*ml", "merge.yaml", MANIFEST, STATE),
)
# Where tensors are, which counts with the tensors.
LAYOUT = ("*.safetensors", "*.safetensors.index.json")
# Weights in other formats: read only where no safetensors are.
OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx*")
TEMPLATES = "additional_chat_templates"
# Keys that record how a file came about. The other keys count, in whatever order and layout they are written.
INCIDENTAL_KEYS = frozenset(
    {"transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "_from_model_config"}
    | {"is_local", "local_files_only"}
)
BY_VALUE = 8192  # bytes; a longer file of settings counts by a digest
CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelIdentity:
    """weights: digest of the tensors (`digest_weights`). files: every other file that decides, by name: its digest,
    or the settings that it holds (`settings_in`).
    """

    weights: str
    files: dict[str, str]


def identity_of(directory: Path, threads: int = 1, weights: str | None = None) -> ModelIdentity:
    """Return the identity of a model directory, a reward model or an adapter. Raises InputError for broken weights.

    weights  the digest of its tensors, if they were hashed while they were read
    """
    files = {path.relative_to(directory).as_posix(): _digest_of(path, threads) for path in deciding_files(directory)}
    return ModelIdentity(weights or digest_weights(directory, threads), files)


def digest_model(directory: Path) -> str:
    """Return one digest of a model's identity: of all that decides what it computes."""
    found = identity_of(directory)
    digest = hasher()
    digest.update(json.dumps([found.weights, found.files], sort_keys=True, separators=(",", ":")).encode())
    return digest_name(digest)


def parent_record(role: str, path: Path, found: ModelIdentity, out: Path) -> ParentRecord:
    """Return the record of a model in the manifest of `out`; of one in the hub's cache also with id and revision."""
    place = path.resolve()
    record = ParentRecord(
        role=role, path=os.path.relpath(place, out.resolve()), weights=found.weights, files=found.files
    )
    hub = SNAPSHOT.search(place.as_posix())
    if hub:
        record["hub"] = f"{hub['owner']}/{hub['name']}@{hub['revision']}"
    return record


def deciding_files(directory: Path) -> Iterator[Path]:
    """Yield the files of a model directory, besides its safetensors, that decide what it computes; sorted by name."""
    others = OTHER_WEIGHTS if weight_files(directory) else ()
    left_out = _one_of((*FOR_PEOPLE, *LAYOUT, *others, ".*"))
    for path in sorted(directory.iterdir()):
        if path.name == TEMPLATES and path.is_dir():
            yield from sorted(path.glob("*.jinja"))
        elif not left_out.match(path.name) and path.is_file():
            yield path


@cache
def _one_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """An expression that matches a file name which fits one of these shell patterns."""
    return re.compile("|".join(map(translate, patterns)))


def _digest_of(path: Path, threads: int) -> str:
    if path.name not in CONFIGS:
        return digest_input(path, threads)
    if path.stat().st_size <= BY_VALUE:
        return settings_in(path.read_bytes())
    return remembered("config", [path], lambda: settings_in(path.read_bytes()))


def as_digests(files: Mapping[str, str]) -> dict[str, str]:
    """Return the files of an identity by digests alone: a recipe that people read need not repeat their settings."""

    def digest(value: str) -> str:
        if value.startswith("blake3:"):
            return value
        found = hasher()
        found.update(value.encode())
        return digest_name(found)

    return {name: digest(str(value)) for name, value in files.items()}


def settings_in(text: bytes) -> str:
    """Return what stands for a JSON file of settings, without those that decide nothing: of a short file they
    themselves, in one order and layout, so that a difference can be shown; else their digest; of its bytes if broken.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    digest = hasher()
    if isinstance(found, dict):
        kept = {key: value for key, value in found.items() if key not in INCIDENTAL_KEYS}
        values = json.dumps(kept, sort_keys=True, separators=(",", ":"))
        if len(text) <= BY_VALUE:
            return values
        digest.update(values.encode())
    else:
        digest.update(text)
    return digest_name(digest)
