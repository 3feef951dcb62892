"""The card of a model on the hub: the one in its directory with complete metadata, or a new one.

What the card of the directory states is kept. Filled in are base_model (all parents that the hub has),
base_model_relation, and `license: gemma` where a Gemma is an ancestor; --license, --base-model and --results go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, read_json
from gemma2.core.outputs.ancestry import CARD, card_facts
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.hub import SNAPSHOT, is_hub_id
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.model_card import CARRIERS, GEMMA, GEMMAS, Facts, metadata, model_card
from gemma2.core.outputs.safetensors_header import printable, weight_files
from gemma2.posttrain.schemas.delivery.export import ExportConfig

from .exported_model import ADAPTER_CONFIG

__all__ = ["base_of_adapter", "hub_card"]

# Width and layers of the published sizes (Gemma 2 report, Table 1): a model of this shape is probably made from one.
SHAPES: dict[object, str] = {(2304, 26): "2B", (3584, 42): "9B", (4608, 46): "27B"}
TOKENS = 256000


def hub_card(config: ExportConfig, directory: Path) -> tuple[str, JsonObject, list[str]]:
    """Return the text of the card, its metadata, and notes for the user. Raises InputError for a broken card."""
    facts = _facts(directory)
    stated, body = _split(directory / CARD)
    found = metadata(facts) if facts is not None else {}
    front: JsonObject = {**found, **stated}
    if found.get("license") == GEMMA:
        front["license"] = GEMMA
    if any(directory.glob("*.gguf")):
        front |= {"library_name": "gguf", "base_model_relation": "quantized"}
    adapted = base_of_adapter(directory)
    if adapted is not None:
        front["base_model_relation"] = "adapter"
        if is_hub_id(adapted):
            front.setdefault("base_model", adapted)
    if config.base_model:
        front["base_model"] = config.base_model
        front.setdefault("base_model_relation", "finetune")
    bases = front.get("base_model")
    if any(str(base).startswith(GEMMAS) for base in (bases if isinstance(bases, list) else [bases])):
        front["license"] = GEMMA
    if config.license:
        front["license"] = config.license
    if config.results is not None:
        front["model-index"] = [{"name": directory.resolve().name, "results": list(_rows(config.results, directory))}]
    if not front.get("base_model"):
        front.pop("base_model_relation", None)
    if not body:
        body = _split_text(model_card(facts))[1] if facts is not None else f"\n# {directory.resolve().name}\n"
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"---\n{head}---\n{body}", front, list(_notes(front, directory))


def base_of_adapter(directory: Path) -> str | None:
    """The base that an adapter records, by its name on the hub if it is from there; None for a model."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    recorded = str(read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    snapshot = SNAPSHOT.search(recorded)
    return f"{snapshot['owner']}/{snapshot['name']}" if snapshot else recorded


def _facts(directory: Path) -> Facts | None:
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        manifest = read_manifest(directory)
        return None if manifest is None else _facts_of_file(directory, manifest)
    return card_facts(directory, read_manifest(directory) or {}, directory)


def _facts_of_file(directory: Path, manifest: JsonMapping) -> Facts:
    """Facts of a directory with a GGUF file alone."""
    from gemma2.core.outputs.ancestry import ancestors_of, name_of

    parents = ancestors_of(manifest, directory)
    return Facts(name=name_of(directory.resolve()), manifest=manifest, config={}, chat=None, parents=parents)


def _split(card: Path) -> tuple[JsonObject, str]:
    """Metadata and text of a card; both empty where there is no card."""
    if not card.is_file():
        return {}, ""
    try:
        return _split_text(card.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{card} has metadata that is not YAML", "correct the part between the two --- lines"
        ) from error


def _split_text(text: str) -> tuple[JsonObject, str]:
    if not text.startswith("---\n"):
        return {}, text
    _, head, body = text.split("---\n", 2)
    found = yaml.safe_load(head) or {}
    if not isinstance(found, dict):
        raise ValueError("not a mapping")
    return found, body


def _rows(results: Path, directory: Path) -> Sequence[JsonMapping]:
    """The rows of model-index that an evaluation of this model keeps. Raises InputError for those of another one."""
    file = results / "results.json" if results.is_dir() else results
    document = read_json(file)
    rows, measured = document.get("model_index"), document.get("model") or {}
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file} holds no rows for a model card", "give the --out of gemma2 eval MODEL --suite gemma2")
    weights, name = (measured.get("weights"), measured.get("name")) if isinstance(measured, dict) else (None, None)
    if weights is not None and weights not in _digests(directory):
        raise InputError(
            f"{file} measured {printable(str(name))}, a model with other weights than {directory}",
            "measure this one, or leave out --results",
        )
    return rows


def _digests(directory: Path) -> set[str]:
    """Digests of the weights of a model, and of the model that it was written from again."""
    manifest = read_manifest(directory) or {}
    again = manifest.get("parents") or [] if manifest.get("command") in CARRIERS else []
    own = {digest_weights(directory)} if weight_files(directory) else set()
    return own | {str(parent.get("weights")) for parent in again}


def _notes(front: JsonMapping, directory: Path) -> list[str]:
    notes = []
    if not front.get("base_model"):
        notes.append("no ancestor is known that the hub has: the card names no base_model (--base-model ORG/NAME)")
    if not front.get("license"):
        config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
        size = SHAPES.get((config.get("hidden_size"), config.get("num_hidden_layers")))
        gemma = size if config.get("vocab_size") == TOKENS else None
        why = f"; it has the shape of Gemma 2 {gemma}: --license gemma if it is made from one" if gemma else ""
        notes.append(f"no licence is known: the card states none (--license){why}")
    return notes
