"""Import of models: a GGUF file, or a model directory in another dtype, as plain safetensors for every other command.

transformers' GGUF reader expands quantised blocks; the result is an ordinary fp32, bf16 or fp16 model without a trace
of the quantisation. Three faults of sources that would harm training are fixed on the way:

1. `generation_config.eos_token_id` gets every stop id, the end-of-turn token included: without it samples run on to
   the limit.
2. The pad token is not a stop token: masked with the padding, a stop token would never be learned.
3. transformers does not read the soft caps of a Gemma 2 file and leaves the query scale at that of the 2B (see
   `gemma2_settings`).

Weights that are not finite, in the source or after the cast (fp16 ends at 65504), are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.safetensors_header import parameter_count
from gemma2.core.progress import SILENT, Progress
from gemma2.merging.inputs.architecture import classifies
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import load_policy, load_reward_model, quiet_libraries, read_config, save_model
from gemma2.posttrain.models.protocols import Network
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import ConvertConfig

from .gguf import find_gguf, read_header

__all__ = ["gemma2_settings", "run_convert"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYERS_27B = 46
CPU = torch.device("cpu")

T = TypeVar("T")
Loaded = tuple[Network, Tokenizer]


def run_convert(config: ConvertConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Convert `config.source` and write the model to `options.out`.

    Raises InputError if the source is not a model, is quantised but not as GGUF, or does not fit the dtype.
    """
    quiet_libraries()
    gguf = find_gguf(config.source)
    with open_run("convert", config, options) as run:
        progress.note(f"reading {gguf or config.source}")
        dtype = DTYPES[config.dtype]
        model, tokenizer = load_gguf(gguf, dtype, progress) if gguf else load_directory(config.source, dtype)
        check_finite(model, config)
        remove_quantisation(model)
        stop_ids = complete_tokens(model, tokenizer, config.source, progress)
        progress.note(f"writing {options.out}")
        save_model(model, tokenizer, run.path)
        return run.finish(
            {
                "architecture": type(model).__name__,
                "parameters": parameter_count(run.path),
                "dtype": config.dtype,
                "stop_ids": stop_ids,
                "pad_token": tokenizer.pad_token,
            }
        )


def load_gguf(path: Path, dtype: torch.dtype, progress: Progress) -> Loaded:
    """Return model and tokenizer of a GGUF file, dequantised, on the CPU."""
    if find_spec("gguf") is None:
        raise InputError(f"reading {path} needs the package gguf", "install the extra: pip install 'gemma2[real]'")
    settings = gemma2_settings(read_header(path).metadata)
    try:
        with dequantisation_progress(progress):
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
            config = AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
            config.update(settings)
            model, report = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be loaded: {detail}", "copy it again, or use another export") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{path} lacks {len(missing)} tensors, for example {missing[0]}", "copy or export it again")
    return model, tokenizer


@contextmanager
def dequantisation_progress(progress: Progress) -> Iterator[None]:
    """Replace the progress bar of transformers' GGUF reader, which no setting switches off, by `progress`."""

    def follow(tensors: Sequence[T], **options: object) -> Iterator[T]:
        with progress.task("dequantise", total=len(tensors), unit="tensors") as task:
            for tensor in tensors:
                yield tensor
                task.advance()

    theirs = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = follow
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = theirs


def gemma2_settings(metadata: JsonMapping) -> JsonObject:
    """Return the settings of a Gemma 2 file that transformers 5.23 does not read: soft caps and scale of the queries.

    The file does not store the scale. Queries are divided by sqrt(head_dim), but by sqrt(d / heads) in the 27B
    (Gemma 2 report, Table 1; `query_pre_attn_scalar` 256 / 256 / 144).
    """
    if metadata.get("general.architecture") != "gemma2":
        return {}
    values = {key.removeprefix("gemma2."): value for key, value in metadata.items() if key.startswith("gemma2.")}
    is_27b = values.get("block_count") == LAYERS_27B
    per_head = values["embedding_length"] // values["attention.head_count"]
    found = {
        "attn_logit_softcapping": values.get("attn_logit_softcapping"),
        "final_logit_softcapping": values.get("final_logit_softcapping"),
        "query_pre_attn_scalar": per_head if is_27b else values.get("attention.key_length"),
    }
    return {key: setting for key, setting in found.items() if setting is not None}


def load_directory(path: Path, dtype: torch.dtype) -> Loaded:
    """Load a policy or a reward model with its tokenizer, on the CPU."""
    config = read_config(path)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise InputError(f"{path} is quantised ({method})", "give the unquantised model, or its GGUF file")
    return load_reward_model(path, dtype, CPU) if classifies(config) else load_policy(path, dtype, CPU)


def check_finite(model: Network, config: ConvertConfig) -> None:
    """Refuse NaN and infinity, to which a cast to a narrower type can turn large weights."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name} of {config.source} is not finite in {config.dtype}",
                "choose another --dtype, or check the source",
            )


def remove_quantisation(model: Network) -> None:
    """Remove the attributes that mark a dequantised model: with them it is neither saved nor loaded as a plain one."""
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            owner.__dict__.pop(name, None)


def complete_tokens(model: Network, tokenizer: Tokenizer, source: Path, progress: Progress) -> list[int]:
    """Set all stop ids, a pad token that is not one of them and, if known, the chat template; return the stop ids."""
    generation = getattr(model, "generation_config", None)
    try:
        stop_ids = ChatFormat(tokenizer, generation).stop_ids
    except InputError as error:
        progress.warn(f"{error.what}; sft and rlhf will not accept it")
        eos = getattr(generation, "eos_token_id", None) or tokenizer.eos_token_id
        stop_ids = sorted(eos) if isinstance(eos, list) else [eos] if eos is not None else []
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stop_ids:
        tokenizer.pad_token = pad_token(tokenizer, stop_ids, source)
    model.config.pad_token_id = tokenizer.pad_token_id
    if generation is not None:
        generation.eos_token_id = stop_ids
        generation.pad_token_id = tokenizer.pad_token_id
    return stop_ids


def pad_token(tokenizer: Tokenizer, stop_ids: list[int], source: Path) -> str:
    """Return a control token for padding: one that the model never writes on purpose and that is not a stop token."""
    controls = {token.content: i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}
    named = {"<pad>": controls.get("<pad>"), tokenizer.unk_token: tokenizer.unk_token_id}
    last = {tokenizer.bos_token: tokenizer.bos_token_id}
    for token, token_id in [*named.items(), *controls.items(), *last.items()]:
        if token is not None and token_id is not None and token_id not in stop_ids:
            return str(token)
    raise InputError(f"the tokenizer of {source} has no token for padding", "add a <pad> token to it")
