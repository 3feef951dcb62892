"""What models that are merged disagree on besides their weights: one warning each, with both sides and the choice.

Chat template, ids that end an answer, special tokens, dtype, longest input. The output has what the first model has
(the tokenizer's owner, where a tokenizer is chosen); nothing of it changes the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

from gemma2.core.json_files import JsonObject, read_json
from gemma2.core.outputs.safetensors_header import printable
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.inputs.config_defaults import filled
from gemma2.merging.inputs.config_keys import LENGTH
from gemma2.merging.methods.request import MergeRequest

from .chat_template import template_of

__all__ = ["differing_files"]

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")


def differing_files(request: MergeRequest, models: Sequence[Checkpoint]) -> Iterator[str]:
    """Yield a warning for each thing that the models disagree on and that the request does not choose."""
    first = models[0].role
    if request.chat_template is None:
        owner = "that of the tokenizer" if request.tokenizer else f"that of {first}"
        yield from _line("chat templates differ", models, _template, f"{owner}; choose: --chat-template 1, 2 or a file")
    if request.tokenizer is None:
        fix = "set eos_token_id in generation_config.json of that model"
        yield from _line("ids that end an answer differ", models, _stop_ids, f"those of {first}; to change: {fix}")
        yield from _line("special tokens differ", models, _special, f"those of {first}; choose: --tokenizer MODEL")
    if request.dtype is None:
        yield from _line("dtypes differ", models, _dtypes, f"that of {first}; choose: --dtype")
    yield from _line(f"{LENGTH} differs", models, _length, f"that of {first}; it does not change the weights")


def _line(what: str, models: Sequence[Checkpoint], read: Callable[[Checkpoint], str], result: str) -> Iterator[str]:
    """Yield one line with the first model's value and the first other one that differs from it."""
    values = [read(model) for model in models]
    other = next((index for index, value in enumerate(values) if value != values[0]), None)
    if other is None:
        return
    pairs = zip(values[0], values[other], strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    sides = [f"{_short(values[index], same)} in {models[index].role}" for index in (0, other)]
    more = sum(value != values[0] for value in values) - 1
    also = f" and {more} more" if more else ""
    yield f"{what}: {', '.join(sides)}{also}; the output has {result}"


def _short(text: str, same: int) -> str:
    """Return a text for a line: of a long one what follows its first `same` characters, which the other one has too."""
    if len(text) <= 60:
        return printable(text)
    start = max(same - 10, 0)
    return printable(f"{'...' if start else ''}{text[start : start + 54]}{'...' if len(text) > start + 54 else ''}")


def _template(model: Checkpoint) -> str:
    text = template_of(model)
    return "none" if text is None else repr(text)


def _settings(model: Checkpoint, name: str) -> JsonObject:
    path = model.origin / name
    return read_json(path) if path.is_file() else {}


def _stop_ids(model: Checkpoint) -> str:
    found = _settings(model, "generation_config.json").get("eos_token_id", model.config.get("eos_token_id"))
    return "none" if found is None else str(sorted(found) if isinstance(found, list) else [found])


def _special(model: Checkpoint) -> str:
    settings = _settings(model, "tokenizer_config.json") | _settings(model, "special_tokens_map.json")
    found = {key: _content(settings[key]) for key in SPECIAL if settings.get(key) is not None}
    return ", ".join(f"{key} {value}" for key, value in found.items()) or "none"


def _content(token: object) -> object:
    """The text of a token, which files write plainly or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _dtypes(model: Checkpoint) -> str:
    return " and ".join(sorted({tensor.dtype for tensor in model.tensors.values()}))


def _length(model: Checkpoint) -> str:
    return str(filled(model.config).get(LENGTH))
