"""The files of a model that go to the hub, and those that stay here.

Up go the weights, what loads them, the card and its pictures, an endpoint's handler, GGUF files, Gemma's notice. The
rest stays: rows that were seen in training, metrics, manifests and recipes, which hold paths of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject, read_json
from gemma2.core.outputs.hub import is_hub_id
from gemma2.core.outputs.model_card import GEMMA
from gemma2.core.outputs.safetensors_header import printable, weight_files
from gemma2.core.sizes import size
from gemma2.merging.inputs.weight_files import companions
from gemma2.posttrain.schemas.delivery.export import ExportConfig

from .endpoint_files import ENDPOINT_FILES
from .exported_model import ADAPTER_CONFIG
from .hub_card import base_of_adapter, hub_card

__all__ = ["Pushed", "pushed_files"]

CARD, NOTICE = "README.md", "NOTICE"
# Gemma's terms ask every distribution of a model derived from one for a file of this name with this sentence.
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
PICTURES = re.compile(r"!\[[^\]]*\]\(([^)/:\s]+\.(?:svg|png|jpg|jpeg|webp))\)")
NAMES = ("_name_or_path", "name_or_path")  # keys of settings
RECORDS = ("*.index.json", "*.gguf", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Pushed:
    """What is uploaded.

    paths     files as they are, by their name on the hub
    texts     files that are written for the hub, by name
    left_out  names in the directory that stay here
    notes     what the user should know
    """

    paths: dict[str, Path]
    texts: dict[str, bytes]
    left_out: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        found = {name: path.stat().st_size for name, path in self.paths.items()}
        return dict(sorted({**found, **{name: len(text) for name, text in self.texts.items()}}.items()))

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return sum(self.sizes.values())

    def rows(self) -> list[JsonObject]:
        """A line for each file."""
        return [{"file": name, "bytes": count, "size": size(count)} for name, count in self.sizes.items()]


def pushed_files(config: ExportConfig, directory: Path) -> Pushed:
    """Return what goes to the hub of a model directory, a GGUF directory or an adapter. Raises InputError."""
    card, front, notes = hub_card(config, directory)
    texts = {CARD: card.encode(errors="backslashreplace")}
    if front.get("license") == GEMMA and not (directory / NOTICE).is_file():
        texts[NOTICE] = GEMMA_NOTICE.encode()
    if (directory / ADAPTER_CONFIG).is_file():
        texts[ADAPTER_CONFIG] = _adapter_config(config, directory)
    texts |= _without_paths(directory)
    paths = {path.name: path for path in _taken(directory, card) if path.name not in texts}
    here = {path.name + ("/" if path.is_dir() else "") for path in directory.iterdir()}
    left_out = sorted(name for name in here if name not in paths and name not in texts)
    return Pushed(paths, texts, tuple(left_out), notes)


def _taken(directory: Path, card: str) -> Iterator[Path]:
    yield from weight_files(directory)
    yield from companions(directory)
    for pattern in RECORDS:
        yield from sorted(directory.glob(pattern))
    names = [*PICTURES.findall(card), *(file.name for file in ENDPOINT_FILES)]
    yield from (directory / name for name in names if (directory / name).is_file())


def _without_paths(directory: Path) -> dict[str, bytes]:
    """Settings that name the directory which a model was once loaded from, without that: it tells of this machine."""
    texts = {}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        found = read_json(directory / name) if (directory / name).is_file() else {}
        left = {key: value for key, value in found.items() if key not in NAMES or not _is_path(value)}
        if left != found:
            texts[name] = (json.dumps(left, indent=2, ensure_ascii=False) + "\n").encode()
    return texts


def _is_path(value: object) -> bool:
    return isinstance(value, str) and not is_hub_id(value)


def _adapter_config(config: ExportConfig, directory: Path) -> bytes:
    """adapter_config.json with the hub's name of the base: a path of this machine leads nowhere, and tells of it."""
    found = read_json(directory / ADAPTER_CONFIG)
    base = config.base_model or base_of_adapter(directory) or ""
    if not is_hub_id(base):
        raise InputError(
            f"the base of the adapter {directory} is {printable(base) or 'not recorded'}, which is not on the hub",
            "name it as the hub does: --base-model ORG/NAME; or merge the adapter: --out DIR without --keep-adapter",
        )
    return (json.dumps({**found, "base_model_name_or_path": base}, indent=2) + "\n").encode()
