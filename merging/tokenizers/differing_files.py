"""What models that are merged disagree on besides their weights: one warning each, with both sides and the choice.

Chat template, generation config with the ids that end an answer, special tokens, dtype, longest input. The output has
what the first model has (the tokenizer's owner, where a tokenizer is chosen); nothing of it changes the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile

from gemma2.core.outputs.model_identity import INCIDENTAL_KEYS
from gemma2.core.outputs.safetensors_header import printable
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.inputs.config_defaults import filled
from gemma2.merging.inputs.config_keys import LENGTH
from gemma2.merging.methods.request import DTYPES, MergeRequest

from .chat_template import template_of
from .generation_config import content_of, generation_of, special_of
from .input_choice import either
from .vocabulary import Vocabulary

__all__ = ["differing_files"]

NONE = "none"
# Records of how a file came about, and settings of speed.
PLAIN = INCIDENTAL_KEYS | {"cache_implementation", "use_cache"}


def differing_files(
    request: MergeRequest, models: Sequence[Checkpoint], vocabulary: Vocabulary | None = None
) -> Iterator[str]:
    """Yield a warning for each thing that the models disagree on and that the request does not choose."""
    first = models[0].role
    if request.chat_template is None:
        owner = "that of the tokenizer" if request.tokenizer else f"that of {first}"
        yield from _line("chat templates differ", models, _template, owner, "--chat-template")
    if request.generation_config is None:
        read = partial(_stop_tokens, vocabulary=vocabulary)
        yield from _line("ids that end an answer differ", models, read, f"those of {first}", "--generation-config")
        yield from _line("generation configs differ", models, _sampling, f"that of {first}", "--generation-config")
    if request.tokenizer is None and request.special_tokens is None:
        yield from _line("special tokens differ", models, _special, f"those of {first}", "--special-tokens")
    if request.dtype is None:
        yield from _line("dtypes differ", models, _dtypes, f"that of {first}; choose: --dtype {_named(models)}")
    yield from _line(f"{LENGTH} differs", models, _length, f"that of {first}; it does not change the weights")


def _line(
    what: str, models: Sequence[Checkpoint], read: Callable[[Checkpoint], str], result: str, flag: str = ""
) -> Iterator[str]:
    """Yield one line with the first model's value and the first other one that differs from it.

    flag  that chooses one of the models by its number, or a file
    """
    values = [read(model) for model in models]
    other = next((index for index, value in enumerate(values) if value != values[0]), None)
    if other is None:
        return
    pairs = zip(values[0], values[other], strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    sides = [f"{_short(values[index], same)} in {models[index].role}" for index in (0, other)]
    more = sum(value != values[0] for value in values) - 1
    also = f" and {more} more" if more else ""
    having = [str(number) for number, value in enumerate(values, start=1) if value != NONE]
    choice = f"; choose: {flag} {either([*having, 'a file'])}" if flag else ""
    yield f"{what}: {', '.join(sides)}{also}; the output has {result}{choice}"


def _short(text: str, same: int) -> str:
    """Return a text for a line: of a long one what follows its first `same` characters, which the other one has too."""
    if len(text) <= 60:
        return printable(text)
    start = max(same - 10, 0)
    return printable(f"{'...' if start else ''}{text[start : start + 54]}{'...' if len(text) > start + 54 else ''}")


def _template(model: Checkpoint) -> str:
    text = template_of(model)
    return NONE if text is None else repr(text)


def _stop_tokens(model: Checkpoint, vocabulary: Vocabulary | None) -> str:
    """The ids that end an answer; where a tokenizer is chosen, which may move ids, the tokens."""
    found = (generation_of(model) or {}).get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if vocabulary is not None:
        return " ".join(sorted(vocabulary.names[model.role].get(item, str(item)) for item in listed)) or NONE
    return str(sorted(listed)) if listed else NONE


def _sampling(model: Checkpoint) -> str:
    """What a generation config says besides ids of tokens: temperature, top_p, ..."""
    found = generation_of(model) or {}
    said = {key: value for key, value in sorted(found.items()) if value is not None and key not in PLAIN}
    return ", ".join(f"{key} {value}" for key, value in said.items() if not key.endswith("_token_id")) or NONE


def _special(model: Checkpoint) -> str:
    found = {key: content_of(value) for key, value in (special_of(model) or {}).items()}
    return ", ".join(f"{key} {value}" for key, value in found.items()) or NONE


def _named(models: Sequence[Checkpoint]) -> str:
    """The dtypes of models, as --dtype takes them."""
    held = {tensor.dtype for model in models for tensor in model.tensors.values()}
    return either([name for name, dtype in DTYPES.items() if dtype in held])


def _dtypes(model: Checkpoint) -> str:
    return " and ".join(sorted({tensor.dtype for tensor in model.tensors.values()}))


def _length(model: Checkpoint) -> str:
    return str(filled(model.config).get(LENGTH))
