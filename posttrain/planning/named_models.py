"""The inputs that a plan is about: models on disk, sizes with nothing there, hub ids by their headers; rows or none.

    2b, 9b, 27b     the shapes of Gemma 2 (shapes.py)
    owner/name      configuration, tokenizer and headers from the hub; the weights stay there
    a directory     as every command reads it
    no rows         a plan without data has no tokens and no time; memory is that of the longest rows that it allows

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from gemma2.core.errors import Gemma2Error, InputError
from gemma2.core.json_files import JsonMapping, JsonObject, read_json
from gemma2.core.outputs.hub import fetch_snapshot, hub_errors, is_hub_id
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.yaml_files import apply_sets
from gemma2.merging.inputs.architecture import classifies, stated
from gemma2.merging.inputs.config_defaults import filled
from gemma2.merging.remote.hub_requests import NoRanges, remote_elements, remote_files
from gemma2.posttrain.runs.inputs import LISTS_OF_MODELS, MODELS
from gemma2.posttrain.schemas import DistillConfig
from gemma2.posttrain.schemas.config import Config, load_yaml

from .estimates import Promise, Sources
from .learning import Sizes
from .shapes import SIZES, ModelShape, shape_of, shape_of_config, shape_of_parameters

__all__ = ["NOTHING", "NO_ROWS", "NamedModels", "name_models", "named_shape", "sizes_of", "with_stand_ins"]

POLICY, REWARD = "policy", "reward model"
NO_ROWS = Path("rows that are not given")  # stands for data of which nothing is known
ROWS = ("data", "prompts", "heldout")

C = TypeVar("C", bound=Config)


@dataclass
class NamedModels:
    """What is known of models that are not on this disk, by the path that the configuration has for them.

    notes  where the figures of each are from
    sizes  names that stand for a model of a size
    """

    shapes: dict[Path, ModelShape] = field(default_factory=dict)
    promised: dict[Path, Promise] = field(default_factory=dict)
    notes: dict[Path, str] = field(default_factory=dict)
    sizes: Mapping[str, ModelShape] = field(default_factory=dict)

    def add(self, more: NamedModels) -> None:
        """Take what is known of further models."""
        self.shapes |= more.shapes
        self.promised |= more.promised
        self.notes |= more.notes

    def copy(self) -> NamedModels:
        """Return what is known, to add to."""
        return NamedModels({**self.shapes}, {**self.promised}, {**self.notes}, self.sizes)


NOTHING = NamedModels()


def name_models(
    config: C, kinds: Callable[[str], str], promised: Sequence[Path] = (), sizes: bool = False
) -> tuple[C, NamedModels]:
    """Return a configuration whose models can be planned with, and what is known of those not on this disk.

    kinds     field -> kind of model that it takes
    promised  directories that other stages make: no path in them is an id or a size
    sizes     whether a name such as 9b is a model of this size; a run needs one on the disk, and so does its dry run
    Raises InputError for a hub id whose configuration cannot be read.
    """
    found = NamedModels(sizes=SIZES if sizes else {})

    def named_one(path: Path, name: str) -> Path:
        made = any(path.is_relative_to(place) for place in promised)
        return path if made else _named(path, name, kinds(name), found)

    changed: dict[str, Path | tuple[Path, ...]] = {}
    found.promised[NO_ROWS] = Promise("data")
    remote = getattr(config, "engine", None) == "openai"
    for name in MODELS:
        value = getattr(config, name, None)
        if isinstance(value, Path) and not (remote and name == "teacher"):
            changed[name] = named_one(value, name)
    for name in LISTS_OF_MODELS:
        value = getattr(config, name, None)
        if isinstance(value, tuple):
            changed[name] = tuple(named_one(path, name) for path in value)
    return config.model_copy(update=changed), found


def named_shape(path: Path, role: str, sizes: bool) -> tuple[Path, ModelShape, str]:
    """Return the place of a policy, its shape, and a note where it is not on this disk. Raises like `name_models`."""
    found = NamedModels(sizes=SIZES if sizes else {})
    place = _named(path, role, POLICY, found)
    return place, found.shapes.get(place) or shape_of(place), found.notes.get(place, "")


def sizes_of(models: NamedModels, sources: Sources) -> Sizes:
    """Return the shape of every model by its path: named, on disk, or promised by an earlier stage."""

    def of(path: Path) -> ModelShape:
        if path in models.shapes:
            return models.shapes[path]
        made = sources.promise(path)
        if made is None:
            return shape_of(path)
        return _promised_shape(made)

    return of


def _promised_shape(made: Promise) -> ModelShape:
    """The shape of a model that is to be made: that of the model whose tokenizer it has, if it is of that shape."""
    parameters = math.nan if made.parameters is None else float(made.parameters)
    place = made.tokenizer
    if made.shape is None or place is None or not (place / "config.json").is_file():
        return shape_of_parameters(parameters)
    shape = shape_of_config(read_json(place / "config.json"), parameters)
    if (shape.model_type, shape.hidden, shape.layers) != made.shape:
        return shape_of_parameters(parameters)
    return replace(shape, outputs=shape.outputs or int(made.kind == REWARD))


def _named(path: Path, field: str, kind: str, found: NamedModels) -> Path:
    if path.exists():
        return path
    size = found.sizes.get(str(path).lower())
    if size is not None:
        return _of_size(str(path).lower(), size, kind, found)
    return _of_hub(str(path), field.replace("_", "-"), found) if is_hub_id(path) else path


def _of_size(name: str, shape: ModelShape, kind: str, found: NamedModels) -> Path:
    """A Gemma 2 of which nothing is on disk; a reward model has a separate path, as it is another kind of model."""
    path = Path(name if kind == POLICY else f"{name} {kind}")
    found.shapes[path] = shape
    found.notes[path] = "Gemma 2 of this size, nothing on disk"
    found.promised[path] = Promise(
        kind, int(shape.parameters), shape.vocabulary, ("gemma2", shape.hidden, shape.layers)
    )
    return path


def _of_hub(name: str, role: str, found: NamedModels) -> Path:
    try:
        folder = fetch_snapshot(name, f"--{role}", weights=False)
    except InputError as error:
        if not found.sizes:
            raise
        sizes = ", ".join(found.sizes)
        raise InputError(error.what, f"{error.hint}, or plan with a size: --{role} {sizes}") from error
    if weight_files(folder):
        return folder
    config = read_json(folder / "config.json")
    parameters, note = _remote_parameters(name, f"--{role}", folder)
    shape = shape_of_config(config, parameters)
    found.shapes[folder], found.notes[folder] = shape, f"{name}: {note}"
    found.promised[folder] = _promise(config, shape, folder)
    return folder


def _promise(config: JsonMapping, shape: ModelShape, folder: Path) -> Promise:
    return Promise(
        REWARD if classifies(config) else POLICY,
        int(shape.parameters),
        shape.vocabulary,
        (shape.model_type, shape.hidden, shape.layers),
        tokenizer=folder,
        facts=stated(filled(config)),
    )


def _remote_parameters(name: str, role: str, folder: Path) -> tuple[float | None, str]:
    """Elements of all tensors of a hub id, from the headers of its files; None where these cannot be had."""
    unable: tuple[type[Exception], ...] = (NoRanges, *hub_errors())
    try:
        return float(sum(remote_elements(remote) for remote in remote_files(name, role, folder))), "headers of the hub"
    except unable as error:
        if isinstance(error, Gemma2Error):
            raise
        return None, f"config.json alone, the headers could not be read ({type(error).__name__})"


def with_stand_ins(
    schema: type[Config], flags: JsonMapping, file: Path | None = None, sets: Sequence[str] = ()
) -> JsonObject:
    """Return the flags of a command, with stand-ins for data that it needs and that nothing gives."""
    given = apply_sets(load_yaml(file) if file else {}, sets) | {k: v for k, v in flags.items() if v is not None}
    needed = {name for name, field in schema.model_fields.items() if name in ROWS and field.is_required()}
    if schema is DistillConfig and not given.keys() & {"prompts", "data", "teacher_cache"}:
        needed.add("prompts")
    return {**flags, **{name: NO_ROWS for name in needed - given.keys()}}
