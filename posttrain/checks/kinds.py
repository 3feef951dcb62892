"""The kind of every input: a policy where a policy belongs, a reward model where a reward model belongs. Torch-free.

An input is on disk, or promised: an earlier stage of a pipeline will make it (`planning/estimates.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, load_json, read_json
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.safetensors_header import printable, read_header, weight_files
from gemma2.merging.inputs.architecture import (
    LM_HEAD,
    ONE_KIND,
    check_sizes,
    check_types,
    classifies,
    difference,
    stated,
)
from gemma2.merging.inputs.config_defaults import filled, is_tied
from gemma2.merging.inputs.weight_files import indexed_tensors
from gemma2.posttrain.planning.estimates import Promise
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.inputs import paths_of
from gemma2.posttrain.schemas import (
    ConvertConfig,
    ExtractLoraConfig,
    GenerateConfig,
    MergeConfig,
    PairsConfig,
    ParetoConfig,
    ProbeConfig,
    RewardConfig,
    RewardEvalConfig,
    RewardFields,
    RewardScoreConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import ChoicesConfig, PerplexityConfig, QaConfig, SuiteConfig, WinRateConfig

__all__ = [
    "ADAPTER",
    "CACHE",
    "DATA",
    "FRONT",
    "POLICY",
    "REWARD",
    "SEPARATE_HEAD",
    "Input",
    "check_kinds",
    "found_at",
    "look_at",
    "merged_kind",
    "wanted_kind",
]

POLICY, REWARD, ADAPTER, DATA, FRONT, CACHE = "policy", "reward model", "adapter", "data", "front", "cache"
RESULTS = "results"
MODELS = (POLICY, REWARD)
TASKS = {"CAUSAL_LM": POLICY, "SEQ_CLS": REWARD}  # of peft
SEPARATE_HEAD = "separate head"  # a fact of a policy: whether its files hold an output head besides the embedding
NAMES = {POLICY: "a policy", REWARD: "a reward model", ADAPTER: "a LoRA adapter", DATA: "a data set"}
NAMES |= {FRONT: "a front", CACHE: "a cache of a teacher", RESULTS: "a result of gemma2 eval"}
# The kind of input that each field takes, by its name, and by command where commands differ.
FIELDS = {name: {POLICY} for name in ("policy", "sft", "teacher", "init", "merged", "policies", "compare", "model")}
FIELDS |= {name: {POLICY} for name in ("against", "win_rate")}
FIELDS |= {"reward": {REWARD}, "from_head": {REWARD}, "front": {FRONT}, "fronts": {FRONT}, "teacher_cache": {CACHE}}
FIELDS |= {name: {DATA} for name in ("data", "prompts", "heldout", "eval_data", "decontaminate")}
FIELDS |= {name: {DATA} for name in ("perplexity", "qa", "choices")}
OF_COMMANDS: dict[type[Config], dict[str, set[str]]] = {
    RewardScoreConfig: {"model": {REWARD}},
    RewardEvalConfig: {"models": {REWARD}},
    RewardConfig: {"model": {POLICY, REWARD}},  # a reward model keeps its head and is trained further
    ProbeConfig: {"model": {POLICY, REWARD}},
    MergeConfig: {"models": {POLICY, REWARD, ADAPTER}, "base": {POLICY, REWARD}},
    PairsConfig: {"judge": {REWARD}},
    WinRateConfig: {"judge": {REWARD}},
    **{form: {"against": {POLICY, RESULTS}} for form in (SuiteConfig, PerplexityConfig, QaConfig, ChoicesConfig)},
    ExtractLoraConfig: {"model": {POLICY, REWARD}, "base": {POLICY, REWARD}},
}
# Fields whose models must have one vocabulary: their distributions are compared, or their weights mixed.
TOGETHER = ("policy", "sft", "teacher", "model", "init", "merged", "policies", "compare")
Input = tuple[str, Path, Promise]  # field, path, properties


def look_at(path: Path) -> Promise | None:
    """The properties of an input on disk, from its manifest, config.json and headers; None if they say nothing."""
    manifest = read_manifest(path) if path.is_dir() else None
    made = COMMANDS[manifest["command"]].makes if manifest and manifest.get("command") in COMMANDS else None
    try:
        config = load_json(path / "config.json")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):  # a pipe, a key twice
            raise
        if (path / "adapter_config.json").is_file():
            return _adapter(path)
        return Promise(made) if made in (DATA, FRONT, CACHE, RESULTS) else None
    if not isinstance(config, dict) or not weight_files(path):
        return None
    check_types(path / "config.json", config)
    classifier = classifies(config)
    tensors = indexed_tensors(path)
    if tensors is None:
        tensors = {name: tensor for file in weight_files(path) for name, tensor in read_header(file).items()}
    check_sizes(path / "config.json", config, tensors)
    return Promise(
        REWARD if classifier else POLICY,
        parameters=sum(tensor.count for tensor in tensors.values()),
        vocabulary=config.get("vocab_size"),
        shape=(config.get("model_type"), config.get("hidden_size"), config.get("num_hidden_layers")),
        tokenizer=path,
        facts=stated(filled(config)) | ({} if classifier else {SEPARATE_HEAD: _has_own_head(config, tensors)}),
    )


def _has_own_head(config: JsonMapping, tensors: Collection[str]) -> bool:
    """Whether a policy's head is a tensor; a stored copy of a tied embedding is not one."""
    return LM_HEAD in tensors and not is_tied(config)


def _adapter(path: Path) -> Promise:
    """The properties of an adapter on disk: those of the model that it records, where that is on disk."""
    settings = read_json(path / "adapter_config.json")
    recorded = settings.get("base_model_name_or_path")
    places = [Path(recorded), path / recorded] if isinstance(recorded, str) and recorded else []
    model = next((look_at(place) for place in places if place.is_dir()), None) or Promise(ADAPTER)
    of = model.kind if model.kind in MODELS else TASKS.get(str(settings.get("task_type")))
    return replace(model, kind=ADAPTER, of=of)


def wanted_kind(config: Config) -> Callable[[str], str]:
    """A function from a field of a command to the kind of model that it takes: a reward model, else a policy."""
    wanted = FIELDS | OF_COMMANDS.get(type(config), {})
    return lambda name: REWARD if POLICY not in wanted.get(name, {POLICY}) else POLICY


def check_kinds(config: Config, known: Mapping[Path, Promise]) -> list[Input]:
    """Refuse an input of the wrong kind, and models that do not fit each other; the models that were found.

    known  what earlier stages will make, by path. Raises InputError naming the flag.
    """
    wanted = FIELDS | OF_COMMANDS.get(type(config), {})
    remote = isinstance(config, GenerateConfig) and config.engine == "openai"
    seen: dict[str, list[Input]] = {}
    for name in type(config).model_fields:
        if name not in wanted or (remote and name == "teacher") or isinstance(config, ConvertConfig):
            continue
        for path in _paths(config, name):
            if isinstance(config, MergeConfig) and _pair(path):
                _check_pair(name, path, known)
            found = found_at(path, known)
            if found is None:
                continue
            if found.kind not in wanted[name]:
                raise InputError(f"{_flag(name)} {path} is {NAMES[found.kind]}", _advice(path, found, wanted[name]))
            seen.setdefault(name, []).append((name, path, found))
    if isinstance(config, MergeConfig):
        models = [one for name in ("base", "models") for one in seen.get(name, [])]
        _check_merge(config, models)
        return models
    if isinstance(config, RewardFields) and config.reward_ensemble == "warm":
        _check_same_architecture(seen.get("reward", []))
    if isinstance(config, ParetoConfig) and "merged" in seen:
        _check_same_architecture([*(seen.get("init") or seen.get("sft", [])), *seen["merged"]])
    together = [one for name in TOGETHER for one in seen.get(name, [])]
    _check_vocabulary(together)
    return together


def _paths(config: Config, name: str) -> list[Path]:
    value = getattr(config, name, None)
    return [Path(value)] if name == "judge" and isinstance(value, str) else paths_of(config, name)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _advice(path: Path, found: Promise, wanted: set[str]) -> str:
    needed = " or ".join(NAMES[kind] for kind in sorted(wanted))
    if found.kind == ADAPTER and POLICY in wanted:
        return f"make a model of it with gemma2 merge linear {path} --out MODEL"
    if found.kind == POLICY and wanted == {REWARD}:
        return f"give {needed}: gemma2 reward trains one"
    return f"give {needed}"


def found_at(path: Path, known: Mapping[Path, Promise]) -> Promise | None:
    """The properties of an input of a merge, promised or on disk; of `MODEL+ADAPTER` those of the model."""
    pair = _pair(path)
    return found_at(pair[0], known) if pair else known.get(path) or look_at(path)


def merged_kind(found: Promise) -> str | None:
    """The kind of model that an input of a merge gives: of an adapter, that of its model."""
    return found.of if found.kind == ADAPTER else found.kind if found.kind in MODELS else None


def _pair(path: Path) -> tuple[Path, Path] | None:
    """Model and adapter of `MODEL+ADAPTER`, as the merge engine reads it."""
    model, plus, adapter = str(path).rpartition("+")
    return (Path(model), Path(adapter)) if plus and model and adapter and not path.exists() else None


def _check_pair(name: str, path: Path, known: Mapping[Path, Promise]) -> None:
    """Refuse `MODEL+ADAPTER` of something else, and an adapter that was trained on another kind of model."""
    pair = _pair(path)
    if pair is None:
        return
    model, adapter = (known.get(place) or look_at(place) for place in pair)
    for place, found, kinds in ((pair[0], model, MODELS), (pair[1], adapter, (ADAPTER,))):
        if found is not None and found.kind not in kinds:
            raise InputError(f"{_flag(name)} {path}: {place} is {NAMES[found.kind]}", "write MODEL+ADAPTER")
    if model is not None and adapter is not None and adapter.of not in (None, model.kind):
        raise InputError(
            f"{_flag(name)} {path}: the model is {NAMES[model.kind]}, the adapter was trained on {NAMES[adapter.of]}",
            "give the model that the adapter was trained on",
        )


def _check_merge(config: MergeConfig, models: list[Input]) -> None:
    """Models that are merged are of one kind and one architecture, and of one vocabulary unless the merge makes one."""
    for one in models[1:]:
        _check_same_kind(models[0], one)
    free = [*(["num_hidden_layers"] if config.slices else []), *(["vocab_size"] if config.tokenizer else [])]
    free += config.allow_config
    _check_same_architecture(models, free)


def _check_same_architecture(models: list[Input], free: Sequence[str] = ()) -> None:
    """Models whose weights are added up agree in all that both state, but for the keys in `free`."""
    compared = 2 if "num_hidden_layers" in free else 3
    shapes = [(one, one[2].shape) for one in models if one[2].shape]
    for one, shape in shapes[1:]:
        first = shapes[0]
        if shape[:compared] != first[1][:compared]:
            raise InputError(
                f"{_named(one)} is {_shape(shape)}, {_named(first[0])} {_shape(first[1])}",
                "use models of one architecture",
            )
    if "vocab_size" not in free:
        _check_vocabulary(models)
    for one in models[1:]:
        _check_same_facts(models[0], one, free)


def _check_same_kind(first: Input, one: Input) -> None:
    kinds = [merged_kind(found) for _, _, found in (first, one)]
    if None not in kinds and kinds[0] != kinds[1]:
        left, right = (_of_kind(found) for _, _, found in (first, one))
        raise InputError(f"{_named(one)} is {right}, {_named(first)} is {left}", ONE_KIND)


def _of_kind(found: Promise) -> str:
    return f"the adapter of {NAMES[found.of]}" if found.kind == ADAPTER and found.of else NAMES[found.kind]


def _check_same_facts(first: Input, one: Input, free: Sequence[str]) -> None:
    found = difference(first[2].facts, one[2].facts, free)
    if found is None:
        return
    key, left, right = found
    if key == SEPARATE_HEAD:
        has, ties = (first, one) if left else (one, first)
        raise InputError(
            f"{_named(has)} has its own {LM_HEAD}, {_named(ties)} ties it to the embedding",
            "save both the same way before merging",
        )
    raise InputError(
        f"{key} differs: {printable(str(left))} in {_named(first)}, {printable(str(right))} in {_named(one)}",
        "use models of one architecture",
    )


def _named(one: Input) -> str:
    return f"{_flag(one[0])} {one[1]}"


def _shape(shape: tuple[object, ...] | None) -> str:
    kind, hidden, layers = shape or ("?", "?", "?")
    return f"{kind} of {layers} layers and width {hidden}"


def _check_vocabulary(models: list[Input]) -> None:
    sizes = [(one, one[2].vocabulary) for one in models if one[2].vocabulary]
    for (role, path, _), size in sizes[1:]:
        if size != sizes[0][1]:
            (other_role, other_path, _), other = sizes[0]
            raise InputError(
                f"{_flag(role)} {path} has a vocabulary of {size}, {_flag(other_role)} {other_path} one of {other}",
                "give models of one family",
            )
