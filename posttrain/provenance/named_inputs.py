"""The models, rows and files that a configuration names: one place that says which option is which. Torch-free.

Every option that takes a path is listed here, so that no input of a command can be left out of its record.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gemma2.core.outputs.hub import locate_model
from gemma2.core.outputs.manifest import own_files
from gemma2.merging.inputs.weight_files import companions
from gemma2.merging.methods.request import FILES, file_named
from gemma2.merging.plan.places import input_places, merge_files, merge_places
from gemma2.posttrain.data.sources import data_files, evaluation_files
from gemma2.posttrain.schemas import ExtractLoraConfig, MergeConfig
from gemma2.posttrain.schemas.config import Config

__all__ = ["EVALUATIONS", "KIND_OF_OPTION", "Named", "holds_results", "named_inputs", "names_a_path", "paths_of"]

Kind = Literal["model", "rows", "evaluation rows", "front", "output", "source", "file", "tokenizer"]

# model            a directory with a policy, a reward model or a classifier
# rows             data files, in the order in which they are read
# evaluation rows  those of every split
# front            the points of a front, of which one is chosen
# output           files of an output of this suite: an earlier front with its values, a teacher's cache
# source           what `convert` reads: a model directory, or a GGUF file or a folder of them
# file             one file
# tokenizer        a directory with a tokenizer: its files of settings
KIND_OF_OPTION: dict[str, Kind] = {
    **dict.fromkeys(("model", "teacher", "policy", "sft", "init", "merged", "safety_model", "from_head"), "model"),
    **dict.fromkeys(("policies", "compare", "reward", "models", "base", "judge", "against", "win_rate"), "model"),
    **dict.fromkeys(("data", "prompts", "heldout", "eval_data", "perplexity", "qa", "choices"), "rows"),
    "decontaminate": "evaluation rows",
    "front": "front",
    **dict.fromkeys(("fronts", "teacher_cache", "outputs"), "output"),
    "source": "source",
    "tokenizer": "tokenizer",
    **dict.fromkeys(("judge_prompt", *FILES), "file"),
}
EVALUATIONS = "evaluations.jsonl"  # what an RL run measured on the way: a front takes it over
PICTURES = (".png", ".svg", ".csv", ".md", ".html")  # drawn or copied from the other files of an output


@dataclass(frozen=True)
class Named:
    """One input.

    option  the field that names it
    role    its name in the record
    path    a model directory, or one file
    """

    option: str
    role: str
    path: Path
    is_model: bool


def named_inputs(config: Config, without: Collection[str] = ()) -> Iterator[Named]:
    """Yield every input of a configuration, in the order of KIND_OF_OPTION and of the values.

    config   with the ids of models replaced by their directories (`runs.inputs.located`), but for merges
    without  options to leave out, whose inputs are not there yet; of a merge, any of them leaves all out

    Raises InputError for data or an output that cannot be found; a missing model directory is yielded like another.
    """
    if isinstance(config, MergeConfig):
        if not {"models", "base"} & {*without}:
            for role, path in merge_places(config.request()):
                yield Named("base" if role == "base" else "models", role, path, True)
        for option, path in merge_files(config.request()):
            if option not in without:
                yield Named(option, option, path, False)
        return
    if isinstance(config, ExtractLoraConfig):
        for option, role in (("base", "base"), ("model", "input")):
            if option not in without:
                places = input_places(getattr(config, option), role)
                yield from (Named(option, found, path, True) for found, path in places)
        return
    for option in KIND_OF_OPTION:  # in one order for all commands: what an output continues comes first
        if option in without or option not in type(config).model_fields:
            continue
        for path in paths_of(config, option):
            yield from _READERS[KIND_OF_OPTION[option]](option, path)
            if option == "policies" and (path / EVALUATIONS).is_file():
                yield Named(option, option, path / EVALUATIONS, False)


def paths_of(config: Config, option: str) -> list[Path]:
    """Return the paths that an option names: one, several or none. A teacher on a server is only a name."""
    if option == "teacher" and getattr(config, "engine", None) == "openai":
        return []
    value = getattr(config, option, None)
    if option in FILES and value is not None:  # the number of a model, a name, or a file
        return [path] if (path := file_named(value)) else []
    if option == "judge":  # a directory, or module:function, or the model of a server
        return [] if value is None or not Path(value).is_dir() else [Path(value)]
    return [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Path)]


def names_a_path(annotation: object) -> bool:
    """Whether a field of this type holds paths."""
    return annotation is Path or any(names_a_path(part) for part in get_args(annotation))


def holds_results(path: Path) -> bool:
    """Whether a path is a result of `gemma2 eval`, which may stand where it measures another model."""
    return (path / "results.json").is_file()


def _model(option: str, path: Path) -> Iterator[Named]:
    if option == "against" and holds_results(path):
        yield from _output(option, path)
    else:
        yield Named(option, option.replace("_", "-"), path, True)


def _rows(option: str, path: Path) -> Iterator[Named]:
    yield from (Named(option, option, file, False) for file in data_files(path))


def _evaluation_rows(option: str, path: Path) -> Iterator[Named]:
    yield from (Named(option, option, file, False) for file in evaluation_files(path))


def _front(option: str, path: Path) -> Iterator[Named]:
    yield Named(option, option, path / "front.json", False)


def _output(option: str, path: Path) -> Iterator[Named]:
    yield from (Named(option, option, file, False) for file in own_files(path) if file.suffix not in PICTURES)


def _source(option: str, path: Path) -> Iterator[Named]:
    if path.is_file():
        yield Named(option, option, path, False)
    elif (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        yield Named(option, option, path, True)
    else:
        yield from (Named(option, option, file, False) for file in sorted(path.glob("*.gguf")))


def _file(option: str, path: Path) -> Iterator[Named]:
    yield Named(option, option, path, False)


def _tokenizer(option: str, path: Path) -> Iterator[Named]:
    yield from (Named(option, option, file, False) for file in companions(locate_model(path, option)))


_READERS: dict[Kind, Callable[[str, Path], Iterator[Named]]] = {
    "model": _model,
    "rows": _rows,
    "evaluation rows": _evaluation_rows,
    "front": _front,
    "output": _output,
    "source": _source,
    "file": _file,
    "tokenizer": _tokenizer,
}
