"""The architectures that can be merged, and what is missing for others.

Decoders, encoders and state-space models whose checkpoints are plain named tensors, one for each parameter, that
transformers loads without code from the model; `tests/merging/test_families.py` merges two random models of each.
The tensors of state-space models are averaged as they are stored (`A_log` is a logarithm).

Models with a vision tower: the weights of the text model are merged. Those of the tower and of the projector into the
text model come from the first model, unchanged: fine-tuning usually freezes them, and most methods would scale them.
"""

from __future__ import annotations

import re

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import printable

from .checkpoint import Checkpoint

__all__ = ["carried_tensors", "check_family", "is_decoder", "tower_note"]

CAUSAL, REWARD, TOKENS, MASKED = "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "ModernBert", "DebertaV2", "Electra")
STATE_SPACE = ("Mamba", "Mamba2", "FalconMamba")
FAMILIES = {
    **dict.fromkeys(("Gemma", "Gemma2", "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3"), (CAUSAL, REWARD, TOKENS)),
    **dict.fromkeys(("Phi", "Phi3", "SmolLM3", "StableLm", "Starcoder2", "GPTNeoX"), (CAUSAL, REWARD, TOKENS)),
    **dict.fromkeys(("Falcon", "Helium"), (CAUSAL, REWARD, TOKENS)),
    **dict.fromkeys(("Olmo", "Olmo2"), (CAUSAL, REWARD)),
    **dict.fromkeys(("Cohere", "Cohere2", "Granite", *STATE_SPACE), (CAUSAL,)),
    **dict.fromkeys(ENCODERS, (MASKED, REWARD, TOKENS)),
    "GPT2": ("LMHeadModel", REWARD, TOKENS),
    "Gemma3": (CAUSAL, REWARD, "ForConditionalGeneration"),
    "Gemma3Text": (REWARD,),
}
ARCHITECTURES = frozenset(family + head for family, heads in FAMILIES.items() for head in heads)
NO_DECODERS = frozenset(family + head for family in (*ENCODERS, *STATE_SPACE) for head in FAMILIES[family])
TOWERS = frozenset({"Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification"})
TOWER = re.compile(r"^(?:model\.)?(vision_tower|multi_modal_projector)\.")


def check_family(architecture: str, model: Checkpoint) -> None:
    """Refuse an architecture that is not in the table. Raises InputError naming what is missing."""
    if architecture in ARCHITECTURES:
        _check_type(architecture, model)
        return
    shown = f"{model}: architecture {printable(architecture)}"
    if model.config.get("is_encoder_decoder") is True:
        raise InputError(
            f"{shown} has an encoder and a decoder; groups by layer, gradients and slices know one stack of layers",
            "merge decoders, encoders or state-space models",
        )
    parts = [key for key in ("vision_config", "audio_config") if isinstance(model.config.get(key), dict)]
    if parts:
        raise InputError(
            f"{shown} has a {parts[0]}: the names of its towers are known for Gemma 3 only",
            "save and merge its text model alone",
        )
    kind = next((key for key in ("mamba_d_state", "attention_hidden_size", "ssm_cfg") if key in model.config), None)
    if kind is not None:
        raise InputError(
            f"{shown} is not supported: of state-space models only Mamba, Mamba 2 and Falcon Mamba are",
            "merge models of these families",
        )
    raise InputError(
        f"{shown} is not supported by merges: no test shows that it loads after one",
        "use Gemma 2 or another family in docs/merging.md",
    )


def _check_type(architecture: str, model: Checkpoint) -> None:
    """Refuse a model type of another family: transformers loads the class of the type, not the architecture."""
    stated = model.config.get("model_type")
    family = architecture[: max(architecture.rfind("For"), architecture.rfind("LMHead"))].lower()
    if stated is not None and re.sub(r"[_-]", "", str(stated)).removesuffix("text") != family.removesuffix("text"):
        raise InputError(
            f"{model.origin}/config.json: architecture {architecture} and model_type {printable(str(stated))} differ",
            "restore the file",
        )


def is_decoder(model: Checkpoint) -> bool:
    """Whether a supported model is a decoder of text alone."""
    names = {str(name) for name in model.config.get("architectures") or ()}
    return not names & (NO_DECODERS | TOWERS)


def carried_tensors(model: Checkpoint) -> tuple[str, ...]:
    """Return the tensors outside the text model, which the output takes from the first model."""
    names = model.config.get("architectures")
    if not isinstance(names, list) or not TOWERS.intersection(map(str, names)):
        return ()
    return tuple(name for name in model.tensors if TOWER.match(name))


def tower_note(model: Checkpoint) -> list[str]:
    """Return the line of plan, report and card about carried tensors."""
    carried = carried_tensors(model)
    parts = dict.fromkeys(match[1] for match in map(TOWER.match, carried) if match)
    return [f"{' and '.join(parts)}: {len(carried)} tensors are those of {model.role}, not merged"] if carried else []
