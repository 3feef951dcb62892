"""A model directory as the checks see it: each file read once, and what could not be read kept as a message."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, read_json
from gemma2.core.outputs.manifest import MANIFEST
from gemma2.core.outputs.safetensors_header import Tensor, read_header, weight_files
from gemma2.merging.inputs.config_defaults import filled

if TYPE_CHECKING:
    from gemma2.posttrain.data.tokenizer import Tokenizer

__all__ = ["ADAPTER", "OUTPUT", "POLICY", "REWARD", "Subject"]

POLICY, REWARD, ADAPTER, OUTPUT = "policy", "reward model", "adapter", "output"
GEMMA2 = ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Subject:
    """One directory, and what is known of it.

    path  as the user gave it, or where the hub's cache holds it
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def kind(self) -> str:
        """`policy`, `reward model`, `adapter`, or `output` for one of this suite's that holds no model."""
        if (self.path / "adapter_config.json").is_file() and not (self.path / "config.json").is_file():
            return ADAPTER
        if not (self.path / "config.json").exists() and not self.weights and (self.path / MANIFEST).is_file():
            return OUTPUT
        return REWARD if "SequenceClassification" in self.architecture else POLICY

    @cached_property
    def config(self) -> JsonObject:
        """config.json as it is; {} where it cannot be read."""
        return self.json("config.json")

    @cached_property
    def settings(self) -> JsonObject:
        """config.json with the defaults of its model type."""
        try:
            return filled(self.config)
        except (TypeError, ValueError, AttributeError, KeyError):  # values of other types: the checks name them
            return dict(self.config)

    @cached_property
    def architecture(self) -> str:
        """The one architecture that config.json names, or "" ."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""

    @property
    def is_gemma2(self) -> bool:
        """Whether it says that it is a Gemma 2, by its type or its architecture."""
        return self.config.get("model_type") == "gemma2" or self.architecture in GEMMA2

    def json(self, name: str) -> JsonObject:
        """A JSON object of the directory; {} where the file is missing or cannot be read (`fault` says why)."""
        if name not in self._read:
            try:
                found = read_json(self.path / name) if (self.path / name).exists() else {}
                self._read[name] = (found, "")
            except InputError as error:
                self._read[name] = ({}, error.what)
        return self._read[name][0]

    def fault(self, name: str) -> str:
        """Why a JSON file could not be read, or ""."""
        self.json(name)
        return self._read[name][1]

    @cached_property
    def _read(self) -> dict[str, tuple[JsonObject, str]]:
        return {}

    @cached_property
    def weights(self) -> list[Path]:
        """Its safetensors files, by name."""
        return weight_files(self.path)

    @cached_property
    def _headers(self) -> tuple[dict[str, Tensor], list[str]]:
        tensors: dict[str, Tensor] = {}
        faults: list[str] = []
        for file in self.weights:
            try:
                tensors |= read_header(file)
            except InputError as error:
                faults.append(error.what)
        return tensors, faults

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor of the files whose headers can be read, by name."""
        return self._headers[0]

    @property
    def header_faults(self) -> list[str]:
        """Why headers could not be read."""
        return self._headers[1]

    @property
    def has_tokenizer(self) -> bool:
        """Whether files of a tokenizer are there."""
        return any((self.path / name).is_file() for name in TOKENIZER_FILES)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, loaded without torch; None where that is not possible (`tokenizer_fault` says why)."""
        return self._tokenizer[0]

    @property
    def tokenizer_fault(self) -> str:
        """Why the tokenizer could not be loaded, or ""."""
        return self._tokenizer[1]

    @cached_property
    def _tokenizer(self) -> tuple[Tokenizer | None, str]:
        from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer

        try:
            return load_light_tokenizer(self.path), ""
        except InputError as error:
            return None, error.what

    @property
    def embedding(self) -> Tensor | None:
        """The tensor whose rows are the tokens."""
        named = (
            tensor for name, tensor in self.tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight"))
        )
        return next(named, None)

    def number(self, key: str) -> int | None:
        """A setting that is a whole number greater than 0, else None."""
        value = self.settings.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def listed_ids(settings: JsonMapping, key: str) -> list[int]:
    """Token ids of a key that holds one, or a list of them."""
    value = settings.get(key)
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, int) and not isinstance(one, bool)]
