"""What a mergekit file says about its output: dtype, tokenizer, rows of single tokens, padding and chat template."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.merging.methods.request import DTYPES, TokenSource, VocabularyChoice

from .mergekit_rules import only_keys, read_model
from .place import Place, flag, shown, text, whole_number

__all__ = ["OutputSpec", "read_output"]


@dataclass(frozen=True)
class OutputSpec:
    """The fields of a request that describe its output."""

    dtype: str | None = None
    tokenizer: str | None = None
    vocabulary: VocabularyChoice | None = None
    chat_template: str | None = None

    def fields(self) -> JsonObject:
        """As fields of MergeRequest."""
        return dict(vars(self))


def read_output(values: JsonMapping, place: Place) -> OutputSpec:
    """The output of a document. Raises UsageError naming the key."""
    dtypes = [_dtype(values.get(key), place.at(key)) for key in ("out_dtype", "dtype")]
    dtype = dtypes[0] or dtypes[1]
    template = values.get("chat_template")
    template = None if template is None else text(template, place.at("chat_template"))
    source = values.get("tokenizer_source")
    if values.get("tokenizer") is None:
        return OutputSpec(dtype, _source(source, place.at("tokenizer_source")), None, template)
    if source is not None:
        raise place.wrong("has 'tokenizer' and 'tokenizer_source'", "keep one of them")
    tokenizer, place = values["tokenizer"], place.at("tokenizer")
    if not isinstance(tokenizer, dict):
        raise place.wrong(f"is {shown(tokenizer)}", "write {source: base}")
    only_keys(tokenizer, ("source", "tokens", "pad_to_multiple_of"), place)
    multiple, spot = tokenizer.get("pad_to_multiple_of"), place.at("pad_to_multiple_of")
    if multiple is not None and whole_number(multiple, spot) < 1:
        raise spot.wrong(f"is {multiple}", "give 1 or more")
    tokens = _tokens(tokenizer.get("tokens"), place.at("tokens"))
    vocabulary = VocabularyChoice(tokens, multiple) if tokens or multiple else None
    return OutputSpec(dtype, _source(tokenizer.get("source", "union"), place.at("source")), vocabulary, template)


def _dtype(value: object, place: Place) -> str | None:
    if value is not None and (not isinstance(value, str) or value not in DTYPES):
        raise place.wrong(f"is {shown(value)}", f"choose one of {', '.join(DTYPES)}")
    return None if value is None else str(value)


def _source(value: object, place: Place) -> str | None:
    if value is None or value in ("base", "union"):
        return None if value is None else str(value)
    return str(read_model(value.removeprefix("model:") if isinstance(value, str) else value, place))


def _tokens(values: object, place: Place) -> tuple[TokenSource, ...]:
    """`{TOKEN: {source: MODEL, force: true}}`; a source is a model, {kind: zero}, or a token of a model."""
    if values is None:
        return ()
    if not isinstance(values, dict):
        raise place.wrong(f"is {shown(values)}", "write {TOKEN: {source: MODEL}}")
    found = []
    for token, value in values.items():
        here = place.at(str(token))
        only_keys(value, ("source", "force"), here)
        force = flag(value.get("force", False), here.at("force"))
        found.append(_token(str(token), value.get("source"), force, here.at("source")))
    return tuple(found)


def _token(token: str, source: object, force: bool, place: Place) -> TokenSource:
    if source is None:
        raise place.wrong("is missing", "add source: MODEL")
    if not isinstance(source, dict) or "kind" not in source:
        return TokenSource(token, str(read_model(source, place)), force=force)
    if source["kind"] == "zero":
        only_keys(source, ("kind",), place)
        return TokenSource(token, None, force=force)
    if source["kind"] != "model_token":
        raise place.at("kind").wrong(f"is {shown(source['kind'])}", "choose zero or model_token")
    only_keys(source, ("kind", "model", "token", "token_id"), place)
    if ("token" in source) == ("token_id" in source):
        raise place.wrong("needs 'token' or 'token_id', and not both", "keep one of them")
    model = str(read_model(source.get("model"), place.at("model")))
    index = whole_number(source["token_id"], place.at("token_id")) if "token_id" in source else None
    return TokenSource(token, model, force=force, other=source.get("token"), index=index)
