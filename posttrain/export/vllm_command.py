"""The command line of vLLM for a Gemma 2: bf16, its context, its template, its stop tokens; an adapter on its base.

vLLM takes template and stop tokens from the model's directory. Where they are missing there, they are written to files
in the user's cache, and named: --chat-template FILE, --generation-config FOLDER
(https://docs.vllm.ai/en/stable/configuration/engine_args/).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from gemma2.core.errors import InputError, UsageError
from gemma2.core.home import cache_folder
from gemma2.core.json_files import JsonObject, read_json
from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.core.outputs.hub import locate_model
from gemma2.core.progress import Progress
from gemma2.posttrain.data.chat import GEMMA_TEMPLATE
from gemma2.posttrain.doctor.checks.finding import Depth
from gemma2.posttrain.doctor.checks.stop_checks import turn_ids
from gemma2.posttrain.doctor.checks.subject import Subject, listed_ids
from gemma2.posttrain.doctor.examination import examine
from gemma2.posttrain.runs.inputs import model_name
from gemma2.posttrain.schemas.delivery.serve import ServeConfig

from .exported_model import ADAPTER_CONFIG, ExportedModel, exported_model
from .gate import refuse_broken

__all__ = ["check_serving", "serve", "vllm_words"]

VLLM = "vllm"
CONTEXT = 8192  # tokens; Gemma 2 report, section 2
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank
EXTRA = "pip install 'gemma2[vllm]' on a machine with a GPU; --print shows the command for another machine"


def vllm_words(config: ServeConfig, more: Sequence[str] = ()) -> list[str]:
    """Return `vllm serve ...` for a model; `more` are further words of the user. Raises InputError, UsageError."""
    model = exported_model(config.model)
    if model.is_reward_model:
        raise UsageError(
            f"{config.model} is a reward model", "gemma2 export MODEL --endpoint --out DIR writes what serves it"
        )
    base, adapter = _parts(model)
    subject = Subject(base)
    length = config.max_model_len or subject.number("max_position_embeddings") or CONTEXT
    words = [VLLM, "serve", str(base), "--served-model-name", model_name(config.model)]
    words += ["--dtype", config.dtype, "--max-model-len", str(length)]
    words += ["--host", config.host, "--port", str(config.port)]
    if config.devices > 1:
        words += ["--tensor-parallel-size", str(config.devices)]
    words += _template(base if adapter is None else adapter, subject)
    words += _stops(subject)
    if adapter is not None:
        words += _adapter(adapter, model_name(config.model))
    return [*words, *more]


def check_serving(config: ServeConfig, progress: Progress) -> None:
    """Run doctor on the model and the machine, and compare vLLM's attention once. Raises InputError."""
    model = exported_model(config.model)
    base, _ = _parts(model)
    refuse_broken(list(dict.fromkeys([base, *model.parts])), Depth.QUICK, config.anyway, progress)
    for found in examine([], Depth.QUICK):
        if found.status == "problem":
            progress.warn(f"this machine: {found.name}: {found.message}; {found.fix}")
    if find_spec(VLLM) is None:
        progress.warn(
            "the vllm on PATH belongs to another Python: its attention was not compared with eager attention; "
            "install gemma2 next to it to have that done"
        )
        return
    import vllm

    from gemma2.posttrain.doctor.vllm_probe import refuse_wrong_attention

    refuse_wrong_attention(base, vllm, progress, config.dtype)


def serve(config: ServeConfig, more: Sequence[str], progress: Progress) -> NoReturn:
    """Check the model and become vLLM. Raises UsageError without vLLM, InputError for what is broken."""
    words = vllm_words(config, more)
    found = shutil.which(VLLM)
    if found is None:
        raise UsageError("gemma2 serve runs vllm, which is not on PATH", EXTRA)
    check_serving(config, progress)
    try:
        os.execv(found, words)
    except OSError as error:
        raise InputError(f"{found} cannot be started ({error.strerror})", "install vLLM again") from error


def _parts(model: ExportedModel) -> tuple[Path, Path | None]:
    """The directories of the whole model and of the adapter on it."""
    if model.adapter is None or len(model.parts) > 1:
        return model.parts[0], model.adapter
    recorded = str(read_json(model.adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    for place in (Path(recorded), model.adapter / recorded):
        if recorded and (place / "config.json").is_file():
            return place, model.adapter
    base = locate_model(recorded, "the model of the adapter") if recorded else Path()
    if not (base / "config.json").is_file() or not recorded:
        raise InputError(
            f"the base of the adapter {model.adapter} was not found ({recorded or 'not recorded'})",
            f"name it: MODEL+{model.adapter}",
        )
    return base, model.adapter


def _template(directory: Path, subject: Subject) -> list[str]:
    """--chat-template, where the tokenizer has none and the tokens of Gemma's."""
    inside = subject.json("tokenizer_config.json").get("chat_template")
    if inside or any((place / "chat_template.jinja").is_file() for place in (directory, subject.path)):
        return []
    if "<end_of_turn>" not in turn_ids(subject):
        return []
    return ["--chat-template", str(_kept("chat_template.jinja", GEMMA_TEMPLATE))]


def _stops(subject: Subject) -> list[str]:
    """--generation-config, where that of the model lacks a stop token of Gemma 2."""
    settings: JsonObject = dict(subject.json("generation_config.json"))
    stops, wanted = listed_ids(settings, "eos_token_id"), turn_ids(subject).values()
    if set(wanted) <= set(stops):
        return []
    settings["eos_token_id"] = sorted({*stops, *wanted})
    settings.pop("max_length", None)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    return ["--generation-config", str(_kept("generation_config.json", text).parent)]


def _adapter(adapter: Path, name: str) -> list[str]:
    rank = read_json(adapter / ADAPTER_CONFIG).get("r")
    most = next((one for one in RANKS if isinstance(rank, int) and rank <= one), RANKS[-1])
    return ["--enable-lora", "--max-lora-rank", str(most), "--lora-modules", f"{name}={adapter}"]


def _kept(name: str, text: str) -> Path:
    """A file in the user's cache, in a folder named after its text."""
    digest = hasher()
    digest.update(text.encode())
    file = cache_folder("serving") / digest_name(digest).rpartition(":")[2][:16] / name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return file
