"""Points taken over from earlier fronts, where everything that decides a measurement is the same. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.model_identity import digest_model
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.provenance.code import code_of
from gemma2.posttrain.runs.inputs import model_name
from gemma2.posttrain.schemas import ParetoConfig
from gemma2.posttrain.schemas.evaluate import measured_settings, unlike_settings

from .front_files import FrontEntry, read_entries

__all__ = ["measured_with", "previous_flat", "take_over"]

INPUTS = {"sft": "SFT policy", "prompts": "prompts", "reward": "reward models", "code": "code of its functions"}


def measured_with(config: ParetoConfig, dtype: object = "float32") -> JsonObject:
    """`{"settings", "inputs", "weights_in"}` of front.json: two fronts can be compared only if these are equal.

    Inputs are digests. dtype: torch's, to which weights are rounded: `--dtype auto` depends on the machine.

    Reward models are called by their names, not their places: the same measurement elsewhere gives the same bytes.
    """
    names = {"reward": [model_name(path) for path in config.reward]}
    return {
        "settings": measured_settings(config) | names,
        "weights_in": str(dtype).removeprefix("torch."),
        "inputs": {
            "sft": digest_model(config.sft),
            "prompts": [digest_file(path) for path in data_files(config.prompts)],
            "reward": [digest_model(path) for path in config.reward],
            "code": code_of(config),
        },
    }


def take_over(fronts: Mapping[Path, JsonMapping], own: JsonMapping) -> list[FrontEntry]:
    """The points of earlier fronts, each once, in their order. `own`: `measured_with` of this front.

    Raises InputError for a front that was measured in another way, naming what differs.
    """
    found: dict[tuple[object, ...], FrontEntry] = {}
    for path, front in fronts.items():
        check_alike(path, front, own)
        for entry in read_entries(path, front):
            found.setdefault(entry.candidate.key, entry)
    entries = list(found.values())
    counts = {len(column) for entry in entries for column in entry.values.values()}
    if len(counts) > 1:
        raise InputError(f"--fronts have values of {min(counts)} and of {max(counts)} prompts", "measure them again")
    return entries


def check_alike(path: Path, front: JsonMapping, own: JsonMapping) -> None:
    """Refuse a front whose points cannot be compared with this one's."""
    theirs, inputs = front.get("settings"), front.get("inputs")
    if not isinstance(theirs, dict) or not isinstance(inputs, dict):
        raise InputError(f"--fronts {path} does not tell what it was measured with", "measure it again")
    different = unlike_settings(theirs, own["settings"])
    weights = front.get("weights_in", own["weights_in"])  # fronts from before it was recorded do not say
    if weights != own["weights_in"]:
        different.append(f"weights in {weights}, here in {own['weights_in']}")
    different += [f"other {what}" for name, what in INPUTS.items() if inputs.get(name) != own["inputs"][name]]
    if different:
        raise InputError(
            f"--fronts {path} was measured with {'; '.join(different)}", "measure both alike, or leave it out"
        )


def previous_flat(fronts: Sequence[Path]) -> int:
    """The largest number of fronts in a row, up to each of these, that gained nothing."""
    summaries = [(read_manifest(path) or {}).get("summary") or {} for path in fronts]
    return max((int(summary.get("flat") or 0) for summary in summaries), default=0)
