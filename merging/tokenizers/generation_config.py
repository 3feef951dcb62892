"""The generation config and the special tokens of an output, where one is chosen: those of an input, or of a file.

generation config  the whole file: ids that end an answer, temperature, ...; of a model without the file its ids in
                   config.json. With a tokenizer that is chosen too, ids of an input follow their tokens
special tokens     the names that tokenizer files give to tokens (`eos_token`, ...), whether a text gets them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject, read_json
from gemma2.core.outputs.safetensors_header import printable
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.methods.request import MergeRequest, file_named, is_input

from .input_choice import of_input
from .row_map import embedding_rows
from .token_ids import TOKENIZER, read_tokenizers
from .vocabulary import GENERATION, Vocabulary, write_json_file

__all__ = ["Asking", "choose_asking", "content_of", "generation_of", "special_of", "write_asking"]

SETTINGS, MAP = "tokenizer_config.json", "special_tokens_map.json"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Asking:
    """What is chosen of how the output is asked; None is that of the first model or of the tokenizer.

    generation  contents of generation_config.json
    special     special tokens, and switches that add them
    whole       they replace all others; else those that a file does not name stay
    config      keys of config.json that follow
    """

    generation: JsonMapping | None = None
    special: JsonMapping | None = None
    whole: bool = True
    config: JsonMapping = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def generation_of(model: Checkpoint) -> JsonObject | None:
    """Return the generation config of a model, its ids from config.json where the file has none; None without both."""
    found = read_json(model.origin / GENERATION) if (model.origin / GENERATION).is_file() else {}
    ids = {key: model.config[key] for key in IDS if model.config.get(key) is not None}
    return (found | {key: value for key, value in ids.items() if found.get(key) is None}) or None


def special_of(model: Checkpoint) -> JsonObject | None:
    """Return the special tokens of a model; None if its files name none."""
    return _special_in([model.origin / SETTINGS, model.origin / MAP]) or None


def _special_in(files: Sequence[Path]) -> JsonObject:
    found: JsonObject = {}
    for path in files:
        found |= read_json(path) if path.is_file() else {}
    return {key: found[key] for key in SPECIAL if found.get(key) is not None}


def choose_asking(
    request: MergeRequest, inputs: Sequence[Checkpoint], first: Checkpoint, vocabulary: Vocabulary | None
) -> Asking:
    """Return what a request chooses. Raises UsageError or InputError for what is not there or does not fit."""
    generation, config, notes = None, {}, []
    if request.generation_config is not None:
        generation, said = _generation(request.generation_config, inputs, first, vocabulary)
        config = {key: value for key, value in generation.items() if key in IDS and key in first.config}
        notes += said
    special, whole = None, True
    if request.special_tokens is not None:
        special, whole, origin = _special(request.special_tokens, inputs)
        _check_known(special, vocabulary, first)
        notes.append(f"special tokens: {origin}")
    return Asking(generation, special, whole, config, tuple(notes))


def _generation(
    choice: str, inputs: Sequence[Checkpoint], first: Checkpoint, vocabulary: Vocabulary | None
) -> tuple[JsonObject, list[str]]:
    flag = "--generation-config"
    if not is_input(choice):
        path = _file(flag, choice)
        found = read_json(path)
        rows = vocabulary.rows if vocabulary else embedding_rows(first)
        for key, value in found.items():
            for item in _ids_in(key, value):
                if not 0 <= item < rows:
                    raise InputError(f"{path}: {key} {item} is not a token: the output has {rows} rows", "correct it")
        return found, [f"generation config: {printable(path.name)}"]
    model, found = of_input(flag, choice, inputs, generation_of)
    if vocabulary is None:
        return found, [f"generation config: that of {model.role}"]
    followed: JsonObject = {}
    for key, value in found.items():
        listed = _ids_in(key, value)
        names = [vocabulary.names[model.role].get(item) for item in listed]
        kept = [
            item if name is None else vocabulary.ids[name]
            for item, name in zip(listed, names, strict=True)
            if name is None or name in vocabulary.ids
        ]
        if listed and not kept:
            lost = ", ".join(printable(name or "") for name in names)
            raise UsageError(f"{flag} {choice}: {key} is {lost}, which the output's tokenizer lacks", "choose a file")
        followed[key] = value if not listed else kept if isinstance(value, list) else kept[0]
    return followed, [f"generation config: that of {model.role}, ids follow their tokens"]


def _ids_in(key: str, value: object) -> list[int]:
    """The ids of tokens in one key of a configuration; none in a key of another kind."""
    listed = value if isinstance(value, list) else [value]
    ids = [item for item in listed if isinstance(item, int) and not isinstance(item, bool)]
    return ids if key.endswith("_token_id") and len(ids) == len(listed) else []


def _special(choice: str, inputs: Sequence[Checkpoint]) -> tuple[JsonObject, bool, str]:
    flag = "--special-tokens"
    if is_input(choice):
        model, found = of_input(flag, choice, inputs, special_of)
        return found, True, f"those of {model.role}"
    path = _file(flag, choice)
    found = _special_in([path])
    if not found:
        raise InputError(f"{path} names no special token", f"give one of {', '.join(SPECIAL[:4])}")
    return found, False, printable(path.name)


def _file(flag: str, choice: str) -> Path:
    path = file_named(choice)
    if path is None:
        raise UsageError(f"{flag} {printable(choice)} is not a file", "choose the number of a model, base, or a file")
    return path


def content_of(token: object) -> object:
    """The text of a token, which files write plainly or with its flags."""
    return token.get("content") if isinstance(token, Mapping) else token


def _check_known(special: JsonMapping, vocabulary: Vocabulary | None, first: Checkpoint) -> None:
    """Require that the output's tokenizer has the tokens; one without tokenizer.json is not read."""
    if vocabulary is None and not (first.origin / TOKENIZER).is_file():
        return
    ids = vocabulary.ids if vocabulary else read_tokenizers([first])[0].ids
    for key, value in special.items():
        token = content_of(value)
        if key.endswith("_token") and isinstance(token, str) and token not in ids:
            raise InputError(f"the output's tokenizer has no {printable(token)!r}, the {key}", "choose other ones")


def write_asking(asking: Asking, directory: Path) -> None:
    """Write what is chosen; the other keys of the tokenizer's files stay."""
    if asking.generation is not None:
        write_json_file(directory / GENERATION, asking.generation)
    if asking.special is None:
        return
    own = {} if asking.whole else _special_in([directory / SETTINGS, directory / MAP])
    special = own | dict(asking.special)
    for name in (SETTINGS, MAP):
        before = read_json(directory / name) if (directory / name).is_file() else {}
        held = SPECIAL if name == SETTINGS else SPECIAL[:4]
        kept = {key: value for key, value in before.items() if key not in held or key in special}
        write_json_file(directory / name, kept | {key: special[key] for key in held if key in special})
