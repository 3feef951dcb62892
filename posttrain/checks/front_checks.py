"""Fronts that are taken over or picked from, on disk or promised: measured alike, and with a line. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject, load_json
from gemma2.posttrain.planning.estimates import Promise
from gemma2.posttrain.provenance.recorded_files import check_recorded, remake
from gemma2.posttrain.schemas import ParetoConfig, PickConfig
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.evaluate import measured_settings, unlike_settings

__all__ = ["check_fronts", "front_facts"]

FILES = ("front.json", "prompts.json", "samples.jsonl")  # what a later front takes over; a choice needs the first


def front_facts(config: ParetoConfig, known: Mapping[Path, Promise]) -> JsonObject:
    """What a front will say of itself: the settings of its measurement, and whether it has a line, if that is known."""
    lines = [bool(config.merged)] + [_facts(path, known).get("line") for path in config.fronts]
    line = True if any(lines) else None if None in lines else False
    return {"settings": measured_settings(config), "line": line}


def check_fronts(config: Config, known: Mapping[Path, Promise]) -> None:
    """Refuse edited fronts, earlier ones that were measured with other settings, and a line that a front lacks.

    known  what earlier stages will make, by path. Raises InputError naming the flag.
    """
    given = config.fronts if isinstance(config, ParetoConfig) else ()
    for path in (config.front,) if isinstance(config, PickConfig) else given:
        if path not in known:
            check_recorded(path, FILES if given else FILES[:1], remake("pareto", path))
    if isinstance(config, ParetoConfig):
        for path in config.fronts:
            theirs = _facts(path, known).get("settings")
            unlike = unlike_settings(theirs, measured_settings(config)) if isinstance(theirs, Mapping) else []
            if unlike:
                raise InputError(
                    f"--fronts {path} was measured with {'; '.join(unlike)}", "measure both alike, or leave it out"
                )
    if isinstance(config, PickConfig) and config.pick.startswith("eta=") and not _may_have_line(config.front, known):
        raise InputError(
            f"--pick {config.pick}: the front {config.front} has no line from init to merge",
            "use best-reward or kl<=X, or measure it with --merged",
        )


def _may_have_line(path: Path, known: Mapping[Path, Promise]) -> bool:
    return _facts(path, known).get("line") is not False


def _facts(path: Path, known: Mapping[Path, Promise]) -> JsonMapping:
    """The facts of a front; empty where nothing is known."""
    if path in known:
        return known[path].facts
    try:
        front = load_json(path / "front.json")
        return {"settings": front.get("settings"), "line": any(point["kind"] == "line" for point in front["points"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # the run itself says what is wrong with it
        return {}
