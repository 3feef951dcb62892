"""The models that a model was made from, as far as their directories still exist, and the card that lists them.

A parent is read from the path in the manifest; its own parents are followed only if its weights are the recorded ones,
since the path may hold another model by now.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, read_json

from .digests import digest_weights
from .hub import SNAPSHOT
from .manifest import read_manifest
from .model_card import Account, Ancestor, Facts, model_card

__all__ = ["CARD", "ancestor_paths", "ancestors_of", "card_facts", "write_card"]

CARD = "README.md"
CARD_BYTES = 1 << 16  # most bytes read of a parent's card
STATED = ("license", "license_name", "license_link", "language")


def write_card(directory: Path, manifest: JsonMapping, out: Path, account: Account | None = None) -> None:
    """Write README.md for the model in `directory`, before its manifest is written.

    out  final path of the output, to which the paths of the manifest's parents are relative
    """
    for file in (*account.pictures, *account.files) if account else ():
        shutil.copyfile(file, directory / file.name)
    card = model_card(card_facts(directory, manifest, out, account))
    (directory / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")


def card_facts(directory: Path, manifest: JsonMapping, out: Path, account: Account | None = None) -> Facts:
    """Return what the card of the model in `directory` is made from; `out` as for `write_card`."""
    config = directory / "config.json"
    adapter = directory / "adapter_config.json"
    return Facts(
        name=name_of(out.resolve()),
        manifest=manifest,
        config=read_json(adapter if adapter.is_file() and not config.is_file() else config),
        chat=_chat(directory),
        parents=ancestors_of(manifest, out),
        sections=account.sections if account else (),
        pictures=tuple(picture.name for picture in account.pictures) if account else (),
        recipe=_recipe(directory / "merge.yaml"),
    )


def ancestor_paths(directory: Path) -> Iterator[Path]:
    """Yield the directories of a model's ancestors by its manifests, the nearest first, as far as they exist."""
    waiting, seen = [directory], {directory.resolve()}
    while waiting:
        place = waiting.pop(0)
        try:
            parents = (read_manifest(place) or {}).get("parents") or []
        except InputError:
            continue
        for parent in parents:
            found = Path(os.path.normpath(place.resolve() / str(parent.get("path", ""))))
            if found.is_dir() and found not in seen:
                seen.add(found)
                waiting.append(found)
                yield found


def _recipe(path: Path) -> JsonObject:
    """Return the merge file of an output; nothing if it is not a merge."""
    from gemma2.core.yaml_files import read_documents

    return read_documents(path)[0] if path.is_file() else {}


def name_of(path: Path) -> str:
    """Return the name of a model directory, in an iteration of WARP together with the iteration's."""
    parts = path.parts[-2:]
    return "/".join(parts) if len(parts) == 2 and parts[0].startswith("iteration-") else path.name


def _chat(directory: Path) -> bool | None:
    """Whether the tokenizer in a directory has a chat template; None without a tokenizer."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    if any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def ancestors_of(manifest: JsonMapping, directory: Path) -> tuple[Ancestor, ...]:
    """Return the parents that the manifest of `directory` records, each with its own parents."""
    return _parents(manifest, directory, {})


# (directory, recorded digest) -> command, metadata of the card, parents
Known = dict[tuple[Path, str], tuple[str, JsonMapping, tuple[Ancestor, ...]]]


def _parents(manifest: JsonMapping, directory: Path, known: Known) -> tuple[Ancestor, ...]:
    parents = manifest.get("parents")
    found = [parent for parent in parents if isinstance(parent, Mapping)] if isinstance(parents, list) else []
    paths = [Path(os.path.normpath(directory.resolve() / str(parent.get("path", "")))) for parent in found]
    return tuple(_ancestor(parent, path, known) for parent, path in zip(found, paths, strict=True))


def _ancestor(parent: JsonMapping, path: Path, known: Known) -> Ancestor:
    """Return one parent. `known` holds the models found before, so that each is read once."""
    digest = str(parent.get("weights", ""))
    found = SNAPSHOT.search(path.as_posix())
    hub = f"{found['owner']}/{found['name']}@{found['revision']}" if found else str(parent.get("hub") or "")
    if (path, digest) not in known:
        known[path, digest] = "", {}, ()  # ends the search for a model that is recorded as its own ancestor
        known[path, digest] = _read(path, digest, known)
    command, stated, parents = known[path, digest]
    return Ancestor(
        role=str(parent.get("role", "")),
        name=name_of(path),
        digest=digest,
        hub=hub,
        command=command,
        metadata=stated,
        parents=parents,
    )


def _read(path: Path, digest: str, known: Known) -> tuple[str, JsonMapping, tuple[Ancestor, ...]]:
    """Return command, stated licence and language, and parents of a model; all empty if it is gone or replaced."""
    try:
        own = read_manifest(path)
        if own is not None and digest_weights(path) != digest:
            return "", {}, ()
    except (InputError, OSError):  # the child's own record is still true
        return "", {}, ()
    return str((own or {}).get("command") or ""), _front_matter(path / CARD), _parents(own or {}, path, known)


def _front_matter(card: Path) -> JsonObject:
    """Return the licence and language that a card states; empty if it is unreadable."""
    import yaml

    try:
        with card.open(encoding="utf-8") as file:
            text = file.read(CARD_BYTES)
        opening, block, _ = text.split("---\n", 2)
        stated = yaml.safe_load(block) if not opening.strip() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(stated, dict):
        return {}
    return {key: stated[key] for key in STATED if _is_plain(stated.get(key))}


def _is_plain(value: object) -> bool:
    """Whether a value is a short text or a list of them."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) and _is_plain(item) for item in value)
    return isinstance(value, str) and 0 < len(value) <= 200
