"""What a model was made from, as far as the directories are still there, and the card that tells it.

A parent is read where the manifest says that it is; its own parents are followed only when its weights are those that
were recorded, since another model may lie there by now.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma2.core.errors import InputError
from gemma2.core.json_files import read_json

from .digests import digest_weights
from .manifest import read_manifest
from .model_card import SNAPSHOT, Account, Ancestor, Facts, model_card

__all__ = ["CARD", "ancestors_of", "write_card"]

CARD = "README.md"
CARD_BYTES = 1 << 16  # of a parent's card that are read
STATED = ("license", "license_name", "license_link", "language")


def write_card(directory: Path, manifest: Mapping[str, Any], out: Path, account: Account | None = None) -> None:
    """Write README.md for the model in `directory`, before its manifest is written.

    out: where the output will be: the paths of the manifest's parents are relative to it.
    """
    pictures = account.pictures if account else ()
    for picture in pictures:
        shutil.copyfile(picture, directory / picture.name)
    card = model_card(
        Facts(
            name=name_of(out.resolve()),
            manifest=manifest,
            config=read_json(directory / "config.json"),
            chat=_chat(directory),
            parents=ancestors_of(manifest, out),
            sections=account.sections if account else (),
            pictures=tuple(picture.name for picture in pictures),
        )
    )
    (directory / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")


def name_of(path: Path) -> str:
    """What a model directory is called: its name, inside an iteration of WARP with the iteration's."""
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


def ancestors_of(manifest: Mapping[str, Any], directory: Path) -> tuple[Ancestor, ...]:
    """The parents that a manifest of `directory` records, each with its own."""
    return _parents(manifest, directory, {})


Known = dict[tuple[Path, str], tuple[str, Mapping[str, Any], tuple[Ancestor, ...]]]


def _parents(manifest: Mapping[str, Any], directory: Path, known: Known) -> tuple[Ancestor, ...]:
    parents = manifest.get("parents")
    found = [parent for parent in parents if isinstance(parent, Mapping)] if isinstance(parents, list) else []
    paths = [Path(os.path.normpath(directory.resolve() / str(parent.get("path", "")))) for parent in found]
    return tuple(_ancestor(parent, path, known) for parent, path in zip(found, paths, strict=True))


def _ancestor(parent: Mapping[str, Any], path: Path, known: Known) -> Ancestor:
    """One parent. `known`: what was found before, so that a model is read once however many ways lead to it."""
    digest = str(parent.get("weights", ""))
    found = SNAPSHOT.search(path.as_posix())
    hub = f"{found['owner']}/{found['name']}@{found['revision']}" if found else str(parent.get("hub") or "")
    if (path, digest) not in known:
        known[path, digest] = "", {}, ()  # a model that is recorded as its own ancestor has none
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


def _read(path: Path, digest: str, known: Known) -> tuple[str, Mapping[str, Any], tuple[Ancestor, ...]]:
    """Command, stated licence and language, and parents of a model; nothing where it is gone or another by now."""
    try:
        own = read_manifest(path)
        if own is not None and digest_weights(path) != digest:
            return "", {}, ()
    except (InputError, OSError):  # what the child records stays true
        return "", {}, ()
    return str((own or {}).get("command") or ""), _front_matter(path / CARD), _parents(own or {}, path, known)


def _front_matter(card: Path) -> dict[str, Any]:
    """Licence and language that a card states; nothing where it is unreadable."""
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
    """A short text, or several."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) and _is_plain(item) for item in value)
    return isinstance(value, str) and 0 < len(value) <= 200
