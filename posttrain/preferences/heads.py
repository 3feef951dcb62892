"""The head of a reward model at the start of training: random, copied from another reward model, or its present one.

    r(x, y) = w . h_last,   w (d,)

WARM (2401.12187, section 3) starts all members from one head that was probed on the frozen backbone: weights can be
averaged as long as the runs stay in one basin, and random heads pull the backbones apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from gemma2.core.errors import InputError
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.safetensors_header import weight_files
from gemma2.core.progress import Progress
from gemma2.merging.inputs.architecture import classifies
from gemma2.posttrain.adapters.frozen_base import base_dtype, quantised_base
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import init_reward_model, load_reward_model, load_tokenizer, read_config
from gemma2.posttrain.models.protocols import RewardNetwork
from gemma2.posttrain.schemas import LoraFields
from gemma2.posttrain.schemas.fields import Attention
from gemma2.posttrain.sharding.placement import WHOLE, Placement

__all__ = ["HEAD", "starting_model"]

HEAD = "score.weight"


def starting_model(
    path: Path,
    seed: int,
    from_head: Path | None,
    progress: Progress,
    attention: Attention = "eager",
    adapter: LoraFields | None = None,
    placement: Placement = WHOLE,
) -> tuple[RewardNetwork, Tokenizer]:
    """Return the model with one output from which training starts. A reward model keeps its own head by default.

    adapter: settings of the training, by which a backbone that stays frozen is rounded; the head stays fp32. Default:
    everything is fp32. Of a model that `placement` divides, the weights of the files are read later; a head from
    elsewhere is set here.
    Raises InputError for several outputs, and for a head that does not fit.
    """
    settings = LoraFields() if adapter is None else adapter
    dtype = base_dtype(settings)
    check_outputs(path, "--model")

    def load(device: torch.device, kernel: Attention) -> tuple[RewardNetwork, Tokenizer]:
        if is_classifier(path):
            return load_reward_model(path, dtype, device, kernel)
        return init_reward_model(path, seed, dtype, device, kernel)

    if placement.divides:
        model, tokenizer = _without_weights(path, seed, placement, attention)
    else:
        model, tokenizer = quantised_base(path, settings, progress, load, attention)
        model.score.float().register_forward_pre_hook(_widened)
    if from_head is not None:
        check_outputs(from_head, "--from-head")
        _warn_of_another_backbone(path, from_head, progress)
        values = _head_of(from_head, model.get_parameter(HEAD).shape)
        with torch.no_grad():
            if placement.divides:
                model.score.weight = nn.Parameter(values)
            else:
                model.get_parameter(HEAD).copy_(values)
    return model, tokenizer


def _without_weights(
    path: Path, seed: int, placement: Placement, attention: Attention
) -> tuple[RewardNetwork, Tokenizer]:
    """Return a model whose weights are to be read into shards, with the head that `init_reward_model` draws."""
    tokenizer = load_tokenizer(path)
    model = cast(RewardNetwork, placement.skeleton(AutoModelForSequenceClassification, path, attention, num_labels=1))
    model.config.pad_token_id = tokenizer.pad_token_id
    if not is_classifier(path):
        head = torch.empty(model.get_parameter(HEAD).shape)
        torch.manual_seed(seed)
        nn.init.normal_(head, 0.0, float(cast(PreTrainedConfig, model.config).initializer_range))
        model.score.weight = nn.Parameter(head)
    return model, tokenizer


def _widened(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """States in the dtype of a head that is wider than its frozen backbone; autocast has the last word."""
    return (inputs[0].to(next(head.parameters()).dtype), *inputs[1:])


def is_classifier(path: Path) -> bool:
    """Whether a model directory contains a sequence classifier."""
    return classifies(read_config(path))


def check_outputs(path: Path, option: str) -> None:
    """Refuse a classifier with several outputs: averages and RL need one score, and one head per backbone."""
    config = read_config(path)
    outputs = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 1)
    if is_classifier(path) and outputs != 1:
        raise InputError(
            f"{option} {path} has {outputs} outputs on one backbone, a reward model has one",
            "train one reward model per score, from the language model",
        )


def _head_of(path: Path, shape: torch.Size) -> Tensor:
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            if HEAD in tensors.keys():  # noqa: SIM118 - not a mapping
                head: Tensor = tensors.get_tensor(HEAD)
                if head.shape != shape:
                    what = f"--from-head {path}: the head reads {head.shape[-1]} features, --model has {shape[-1]}"
                    raise InputError(what, "give a reward model on the same backbone")
                return head.float()
    raise InputError(f"--from-head {path} has no {HEAD}", "give a reward model, for example of gemma2 reward probe")


def _warn_of_another_backbone(path: Path, from_head: Path, progress: Progress) -> None:
    """Warn if the manifest shows another backbone: a probed head fits only the features of its backbone."""
    parents = (read_manifest(from_head) or {}).get("parents", [])
    backbones = [parent["weights"] for parent in parents if parent["role"] == "model"]
    if backbones and digest_weights(path) not in backbones and path.resolve() != from_head.resolve():
        progress.warn(f"the head of {from_head} was trained on another backbone than {path}")
