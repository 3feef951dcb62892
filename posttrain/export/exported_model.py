"""What is exported: a model directory, an adapter with or without its base. Reads JSON files only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject, read_json
from gemma2.core.outputs.ancestry import ancestor_paths
from gemma2.core.outputs.hub import locate_model
from gemma2.core.outputs.manifest import require_complete

__all__ = ["ADAPTER_CONFIG", "SENTENCEPIECE", "ExportedModel", "exported_model", "sentencepiece_of"]

SENTENCEPIECE = "tokenizer.model"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ExportedModel:
    """The model to export.

    given     as the user named it; MODEL+ADAPTER too
    parts     its directories: the model, or the model and the adapter, or the adapter alone
    adapter   the directory of the adapter, if there is one
    """

    given: Path
    parts: tuple[Path, ...]
    adapter: Path | None = None

    @property
    def path(self) -> Path:
        """The directory whose files are the model: of an adapter the adapter's."""
        return self.parts[-1]

    @property
    def config(self) -> JsonObject:
        """The configuration of the model; of an adapter alone, the adapter's."""
        name = "config.json" if (self.parts[0] / "config.json").is_file() else ADAPTER_CONFIG
        return read_json(self.parts[0] / name)

    @property
    def is_reward_model(self) -> bool:
        """Whether it scores texts."""
        names = self.config.get("architectures")
        named = isinstance(names, list) and any("SequenceClassification" in str(name) for name in names)
        return named or self.config.get("task_type") == "SEQ_CLS"


def exported_model(model: Path) -> ExportedModel:
    """Return the model that a name stands for; hub ids are fetched. Raises InputError."""
    base, plus, adapter = str(model).rpartition("+")
    if plus and base and adapter and not model.exists():
        parts = tuple(_directory(Path(name)) for name in (base, adapter))
        if not (parts[1] / ADAPTER_CONFIG).is_file():
            raise InputError(f"{parts[1]} is not an adapter", "give MODEL+ADAPTER")
        return ExportedModel(model, parts, parts[1])
    path = _directory(model)
    is_adapter = (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()
    return ExportedModel(model, (path,), path if is_adapter else None)


def _directory(name: Path) -> Path:
    path = locate_model(name, "model")
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{name} {what}", "give a model directory, an adapter or a hub id")
    require_complete(path, "model")
    if not any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        raise InputError(f"{path} holds neither config.json nor {ADAPTER_CONFIG}", "give a model directory")
    return path


def sentencepiece_of(directory: Path) -> Path | None:
    """Return the SentencePiece file of a model, or that of an ancestor with the same tokenizer.json; else None."""
    own = directory / "tokenizer.json"
    for place in (directory, *ancestor_paths(directory)):
        found = place / SENTENCEPIECE
        same = place == directory or (
            own.is_file() and (place / own.name).is_file() and own.read_bytes() == (place / own.name).read_bytes()
        )
        if found.is_file() and same:
            return found
    return None
