"""The models and data that a configuration names: resolves hub ids to directories and refuses missing inputs.

Torch-free, so that errors show before the step imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.hub import SNAPSHOT, is_hub_id, locate_model
from gemma2.core.outputs.manifest import read_manifest
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.provenance.named_inputs import KIND_OF_OPTION, holds_results
from gemma2.posttrain.schemas import PairsConfig, RewardFields
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import WinRateConfig

from .run_directory import Parent, check_parents
from .servers import check_servers

__all__ = ["check_inputs", "check_judge", "check_reward_terms", "inputs_of", "located", "model_name", "paths_of"]

MODELS = ("model", "teacher", "policy", "sft", "init", "merged", "safety_model", "from_head", "against", "win_rate")
LISTS_OF_MODELS = ("policies", "compare", "reward", "models")
FRONTS = ("front", "fronts")
ROWS = tuple(name for name, kind in KIND_OF_OPTION.items() if kind in ("rows", "evaluation rows"))

C = TypeVar("C", bound=Config)


def located(config: C, promised: Sequence[Path] = ()) -> C:
    """Replace the hub ids of models by their directories in the hub's cache; models are downloaded if needed.

    A path in a `promised` directory, which may not exist yet, is never a hub id, even if it looks like one (`out/sft`).
    Raises InputError for an id that cannot be loaded.
    """

    def is_id(path: Path) -> bool:
        return is_hub_id(path) and not any(path.is_relative_to(place) for place in promised)

    found: dict[str, Path | tuple[Path, ...]] = {
        name: locate_model(path, f"--{name.replace('_', '-')}")
        for name, path in inputs_of(config).items()
        if name in MODELS and is_id(path)
    }
    for name in LISTS_OF_MODELS:
        paths = getattr(config, name, ())
        if isinstance(paths, tuple) and any(is_id(path) for path in paths):
            found[name] = tuple(locate_model(path, f"--{name}") if is_id(path) else path for path in paths)
    return config.model_copy(update=found) if found else config


def inputs_of(config: Config) -> dict[str, Path]:
    """Return the models that a configuration names, by field.

    Left out: a teacher on a server, which is only a name, and a result of `gemma2 eval` in the place of a model.
    The second of several reward models is `reward-2`.
    """
    remote = {"teacher"} if getattr(config, "engine", None) == "openai" else set()
    found = {name: getattr(config, name, None) for name in MODELS if name not in remote}
    rewards = getattr(config, "reward", ())
    if isinstance(rewards, tuple):
        found |= {f"reward-{i}" if i > 1 else "reward": path for i, path in enumerate(rewards, start=1)}
    models = {name: path for name, path in found.items() if isinstance(path, Path)}
    if "against" in models and holds_results(models["against"]):
        del models["against"]
    return models


def check_inputs(config: Config, promised: Sequence[Path] = ()) -> None:
    """Raise InputError for missing models or data. Inputs in a `promised` directory are written by other stages."""

    def is_promised(path: Path) -> bool:
        return any(path.is_relative_to(place) for place in promised)

    # Without the number of a reward model, which is not part of the flag.
    roles = [(name.partition("-")[0].replace("_", "-"), path) for name, path in inputs_of(config).items()]
    roles += [(name, path) for name in ("policies", "compare") for path in paths_of(config, name)]
    check_parents([Parent(role, path) for role, path in roles if not is_promised(path)])
    if isinstance(config, RewardFields) and config.REWARD_NEEDED:
        check_reward_terms(config)
    if isinstance(config, PairsConfig | WinRateConfig) and config.judge is not None:
        check_judge(config.judge, promised, isinstance(config, PairsConfig))
    check_servers(config)
    cache = getattr(config, "teacher_cache", None)
    if cache is not None and not is_promised(cache) and (read_manifest(cache) or {}).get("status") != "complete":
        raise InputError(f"--teacher-cache {cache} is not a finished cache", "make one with gemma2 distill cache")
    for option, path in ((name, path) for name in FRONTS for path in paths_of(config, name)):
        if not is_promised(path) and (read_manifest(path) or {}).get("status") != "complete":
            raise InputError(f"--{option} {path} is not a finished front", "make one with gemma2 pareto")
    for path in paths_of(config, "against"):
        if not is_promised(path) and holds_results(path) and (read_manifest(path) or {}).get("status") != "complete":
            raise InputError(f"--against {path} is not a finished result", "make one with gemma2 eval, or give a model")
    for path in (path for name in ROWS for path in paths_of(config, name)):
        if not is_promised(path):
            data_files(path)


def paths_of(config: Config, name: str) -> list[Path]:
    """Return the paths in one field: one, several or none."""
    value = getattr(config, name, None)
    return [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, Path)]


def check_reward_terms(config: RewardFields) -> None:
    """Raise UsageError for a configuration without a reward."""
    if not config.reward_terms:
        raise UsageError("no reward is given", "give --reward RM, --reward-fn module:function, or both")


def check_judge(judge: str, promised: Sequence[Path] = (), functions: bool = True) -> None:
    """Raise UsageError for an unknown kind of judge. A missing function is reported when its module is imported.

    functions  whether module:function is a judge here
    """
    if judge.startswith("openai:") or any(Path(judge).is_relative_to(place) for place in promised):
        return
    if Path(judge).is_dir():
        check_parents([Parent("judge", Path(judge))])
    elif not functions:
        raise UsageError(
            f"--judge {judge!r} is not a directory",
            "name a reward model, or openai:MODEL; a function is given with --reward-fn",
        )
    elif ":" not in judge:
        raise UsageError(
            f"--judge {judge!r} is neither a directory nor module:function",
            "name a reward model, a function, or openai:MODEL",
        )


def model_name(path: Path) -> str:
    """Return the display name of a model: its hub id, or the name of its directory."""
    found = SNAPSHOT.search(path.resolve().as_posix())
    return f"{found['owner']}/{found['name']}" if found else path.resolve().name
