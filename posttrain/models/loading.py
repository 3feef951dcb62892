"""Loading and saving of models and tokenizers; errors where transformers only warns.

Weights are read from safetensors only; a tensor missing from the checkpoint is an error, never initialised at random.
The attention kernel is eager unless the caller hands on what `--attention` says (posttrain/attention/choice.py).
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from gemma2.core.errors import InputError
from gemma2.core.foreign.code_keys import refuse_code
from gemma2.core.json_files import JsonObject, read_json
from gemma2.core.outputs.safetensors_header import read_header, weight_files
from gemma2.merging.inputs.architecture import check_types, classifies
from gemma2.posttrain.attention.choice import chosen_kernel
from gemma2.posttrain.data.load_tokenizer import require_tokenizer
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.schemas.fields import Attention

from .as_written import check_loaded
from .protocols import CausalLM, Network, RewardNetwork

__all__ = [
    "default_device",
    "init_reward_model",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "open_to_readers",
    "quiet_libraries",
    "save_model",
    "save_tokenizer",
]

SENTENCEPIECE = "tokenizer.model"
LACKING = ("mps",)  # accelerators without float64


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU: CUDA, ROCm, XPU, or what a plug-in of torch registers.

    Apple's MPS is left out: it has no float64, in which draws and the KL are summed.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type in LACKING else torch.device(found.type)


def read_config(path: Path) -> JsonObject:
    """Read config.json of a model directory. Raises InputError for a model that cannot or must not be loaded."""
    if not (path / "config.json").exists():
        raise InputError(f"{path} holds no config.json", "give a model directory")
    config = read_json(path / "config.json")
    check_types(path / "config.json", config)
    refuse_code(path)
    shards = weight_files(path)
    if not shards:
        raise InputError(f"{path} holds no *.safetensors", "convert the weights to safetensors first")
    for shard in shards:
        read_header(shard)  # its errors name file and cause, the library's errors do not
    return config


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a model directory, with a pad token other than eos: padding with eos would hide real ends.

    Raises InputError if the directory has no tokenizer, or the tokenizer no token for padding.
    """
    require_tokenizer(path)
    try:
        refuse_code(path)
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # the library raises whatever its parsers raise
        raise InputError(
            f"no tokenizer can be loaded from {path}", "copy the tokenizer files next to the weights"
        ) from error
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # Padding is masked everywhere, so any id that is never generated will do.
        named = "<pad>" if "<pad>" in tokenizer.get_vocab() else None
        others = (named, tokenizer.unk_token, tokenizer.bos_token)
        tokenizer.pad_token = next((token for token in others if token not in (None, tokenizer.eos_token)), None)
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"the tokenizer of {path} has no token for padding", "add a pad_token to tokenizer_config.json"
        )
    return tokenizer


def _load(
    factory: type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification],
    path: Path,
    dtype: torch.dtype,
    allowed_missing: tuple[str, ...] = (),
    attention: str = "eager",
    **options: object,
) -> PreTrainedModel:
    """Load a model with transformers and an attention kernel, by its name there.

    Raises InputError for missing and unknown tensors, except `allowed_missing`.
    """
    written = read_config(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
        config._attn_implementation = attention  # the file's choice would win over the argument
        model, report = factory.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # the library raises whatever its parsers and validators raise
        detail = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} cannot be loaded as a model: {detail}", "check config.json and the weights"
        ) from error
    if model.config._attn_implementation != attention:
        raise RuntimeError(f"{path} was loaded with {model.config._attn_implementation} in place of {attention}")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(allowed_missing or ("\0",)))
    for kind, keys in (("lacks", missing), ("has the unknown", sorted(report["unexpected_keys"]))):
        if keys:
            raise InputError(
                f"{path} {kind} tensor {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else ""),
                f"check that the weights belong to {type(model).__name__}",
            )
    if dtype != torch.float16:  # of `convert` alone, which looks for what fp16 cannot hold
        _check_weights(path, model)
    check_loaded(model, path, written, dtype, weight_files(path))
    return model


def _check_weights(path: Path, model: PreTrainedModel) -> None:
    """Raise InputError for weights that no training can begin with: NaN, infinity, an embedding of zeros."""
    for name, weight in model.named_parameters():
        # One pass without a second tensor; finite values whose sum overflows are looked at again.
        if not torch.isfinite(weight.detach().sum(dtype=torch.float32)) and not torch.isfinite(weight).all():
            raise InputError(f"{path}: {name} holds NaN or Inf", "the model is broken; use an earlier checkpoint")
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding) and not embedding.weight.any():
        raise InputError(
            f"{path}: every element of the embedding is 0", "was it saved while its weights were elsewhere?"
        )


def load_policy(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    attention: Attention = "eager",
    computes_on: torch.device | None = None,
) -> tuple[CausalLM, Tokenizer]:
    """Load a causal LM, in eval mode, and its tokenizer.

    device       where it is kept; by default the accelerator if there is one
    computes_on  where it is used, for which its attention is chosen, if it is kept elsewhere meanwhile
    Raises InputError if the directory is not a model, or tensors are missing, unknown or of the wrong shape; UsageError
    for an attention kernel that does not fit.
    """
    config = read_config(path)
    if classifies(config):
        raise InputError(f"{path} is a reward model, not a language model", "give a causal LM")
    device = device or default_device()
    kernel = chosen_kernel(attention, path, dtype, computes_on or device)
    model = _load(AutoModelForCausalLM, path, dtype, attention=kernel)
    return model.to(device).eval(), load_tokenizer(path)


def load_reward_model(
    path: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None, attention: Attention = "eager"
) -> tuple[RewardNetwork, Tokenizer]:
    """Load a reward model, a sequence classifier with one output, in eval mode, and its tokenizer."""
    config = read_config(path)
    if not classifies(config):
        raise InputError(f"{path} is not a reward model", "train one with gemma2 reward")
    device = device or default_device()
    kernel = chosen_kernel(attention, path, dtype, device)
    model = _load(AutoModelForSequenceClassification, path, dtype, attention=kernel)
    if model.config.num_labels != 1:
        raise InputError(f"{path} has {model.config.num_labels} outputs", "a reward model has one")
    tokenizer = load_tokenizer(path)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def init_reward_model(
    path: Path,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    attention: Attention = "eager",
) -> tuple[RewardNetwork, Tokenizer]:
    """Build a reward model on the backbone of a language model; the head is drawn from `seed` (WARM, section 2)."""
    device = device or default_device()
    kernel = chosen_kernel(attention, path, dtype, device)
    torch.manual_seed(seed)
    missing = ("score.",)
    model = _load(AutoModelForSequenceClassification, path, dtype, missing, kernel, num_labels=1)
    tokenizer = load_tokenizer(path)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device), tokenizer


def save_model(model: Network, tokenizer: Tokenizer, directory: Path) -> None:
    """Write config, weights, generation config and tokenizer; files get the modes that the umask gives."""
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    open_to_readers(directory)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the files of a tokenizer, and the SentencePiece model of the directory that it was loaded from.

    transformers does not write that one back, and llama.cpp takes the vocabulary of a Gemma 2 from nothing else.
    """
    tokenizer.save_pretrained(directory)
    source = Path(tokenizer.name_or_path or "") / SENTENCEPIECE
    if tokenizer.name_or_path and source.is_file() and not (directory / SENTENCEPIECE).exists():
        shutil.copyfile(source, directory / SENTENCEPIECE)


def open_to_readers(directory: Path) -> None:
    """Give weight files the modes that the umask gives; safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars and warnings; the commands show their own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("trl", "accelerate", "datasets", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()
