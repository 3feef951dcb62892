"""The flags of `gemma2 merge METHOD`, made from the table of merge methods. Free of numpy, for quick help pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import typer

from gemma2.cli.terminal.options import AsJson, DryRun, Force, Out, Quiet
from gemma2.cli.terminal.schema_flags import one_word
from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.yaml_files import parse_value
from gemma2.merging.methods.method import Method
from gemma2.merging.methods.option import OPTIONS, Option, OptionValue
from gemma2.merging.methods.request import FILES, MergeRequest
from gemma2.merging.recipes.place import Place, read_option
from gemma2.merging.recipes.recipe import read_slices

__all__ = ["CHOICES", "COMMON", "ENDING", "MODELS", "STREAM", "THREADS", "Flag", "flags_of", "request_of"]

Flag = tuple[Any, Any]  # the type that typer parses, and the option


def _setting(flag: str, metavar: str | None, text: str, panel: str = "Settings") -> Any:  # noqa: ANN401
    return typer.Option(None, flag, metavar=metavar, help=text, show_default=False, rich_help_panel=panel)


def _flag(option: Option, method: Method) -> Flag:
    """One option of a method as a flag: numbers that may differ between tensors or models are text."""
    default = method.default(option)
    gradient = "; A,B,... from first layer to last" if option.varies and not option.per else ""
    text = option.help[0].upper() + option.help[1:] + gradient + (f" [default {default}]." if default else ".")
    if option.kind == "switch":
        both = f"--{option.name}/--no-{option.name}" if option.recorded else f"--{option.name}"
        return bool | None, _setting(both, None, text)
    if option.kind == "integer":
        return int | None, _setting(f"--{option.name}", "INT", text)
    if not option.per and not option.varies:
        return float | None, _setting(f"--{option.name}", "FLOAT", text)
    return str | None, _setting(f"--{option.name}", "A,B,..." if option.per else "FLOAT", text)


def flags_of(method: Method) -> dict[str, Flag]:
    """Flags of one method: its base, its options in the order of its entry, then those of every method."""
    help_of_base = "The init of the models; task vectors start from it."
    base = {"base": (Path | None, _setting("--base", "MODEL", help_of_base, "Inputs"))}
    own = {option.name: _flag(option, method) for option in method.options}
    return (base if method.base != "none" else {}) | own | COMMON


# --- from flags to a request ------------------------------------------------------------------------------------------

COMMAND_LINE = Path("the command line")


def _value(option: Option, given: object) -> OptionValue:
    """The value of a flag: commas separate numbers; what starts with a bracket is YAML, as in a merge file."""
    place = Place(COMMAND_LINE, key=f"--{option.name}")
    if not isinstance(given, str):
        return read_option(option, given, place)
    if given.lstrip().startswith(("[", "{")):
        return read_option(option, parse_value(given), place)
    numbers = _numbers(option.name, one_word(f"--{option.name}", given))
    return read_option(option, numbers if len(numbers) > 1 or option.per else numbers[0], place)


def _numbers(flag: str, text: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"--{flag} {text} is not a list of numbers", "separate them by commas: 0.3,0.5") from error
    if not numbers:
        raise UsageError(f"--{flag} is empty", "give a number, or several with commas")
    return numbers


def request_of(method: str, models: list[Path], given: JsonMapping) -> MergeRequest:
    """The library's request for a command line."""
    names = ("base", "granularity", "tokenizer", *FILES, "dtype", "threads", "stream")
    common: JsonObject = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("allow_config"):
        common["allow_config"] = tuple(given["allow_config"])
    if given.get("slices") is not None:
        place = Place(COMMAND_LINE, key="--slices")
        common["slices"] = read_slices(parse_value(given["slices"]), place, models, given.get("base"))
    values = {
        option.attribute: _value(option, given[option.name])
        for option in OPTIONS.values()
        if given.get(option.name) is not None
    }
    return MergeRequest(method=method, models=tuple(models), **common, values=values)


# --- flags of every method --------------------------------------------------------------------------------------------

THREADS = _setting("--threads", "INT", "Threads that read, compute and write [default cores + 1; >=1].")
STREAM = typer.Option(
    False,
    "--stream",
    help="Merge models of the hub while they arrive; the result is the same.",
    show_default=False,
    rich_help_panel="Settings",
)
VERIFY = typer.Option(
    True,
    "--verify/--no-verify",
    help="Read the output back and compare it with what was written [default yes].",
    show_default=False,
    rich_help_panel="Output and control",
)
ENDING: dict[str, Flag] = {
    "out": (Path | None, Out),
    "verify": (bool, VERIFY),
    "force": (bool, Force),
    "dry_run": (bool, DryRun),
    "as_json": (bool, AsJson),
    "quiet": (bool, Quiet),
}
CHOICES: dict[str, Flag] = {
    "allow_config": (
        list[str] | None,
        _setting(
            "--allow-config", "KEY", "Key of config.json that may differ: the first model's value is kept; repeatable."
        ),
    ),
    "chat_template": (
        str | None,
        _setting("--chat-template", "N|base|FILE", "Chat template of the output: that of model N, or a file."),
    ),
    "generation_config": (
        str | None,
        _setting(
            "--generation-config", "N|base|FILE", "generation_config.json of the output: that of model N, or a file."
        ),
    ),
    "special_tokens": (
        str | None,
        _setting("--special-tokens", "N|base|FILE", "Special tokens of the output: those of model N, or of a file."),
    ),
}
COMMON: dict[str, Flag] = {
    "granularity": (
        Literal["layer", "tensor", "model"] | None,
        _setting(
            "--granularity", "layer|tensor|model", "Tensors that share coefficients or thresholds [default by method]."
        ),
    ),
    "slices": (str | None, _setting("--slices", "YAML", "Layers to stack, as in a merge file: docs/merging.md.")),
    "tokenizer": (
        str | None,
        _setting("--tokenizer", "base|union|MODEL", "Tokenizer of the output; without it all must be equal."),
    ),
    **CHOICES,
    "dtype": (
        Literal["bfloat16", "float16", "float32"] | None,
        _setting("--dtype", "bfloat16|float16|float32", "dtype of the output [default that of the first model]."),
    ),
    "threads": (int | None, THREADS),
    "stream": (bool, STREAM),
    **ENDING,
}
MODELS = typer.Argument(
    metavar="MODEL",
    help="Directories, hub ids, LoRA adapters or MODEL+ADAPTER, in the order of the merge.",
    show_default=False,
    rich_help_panel="Inputs",
)
