"""The embedded models: real Gemma 2 networks, small enough to train from nothing on a laptop.

Every feature of the architecture is on and matters at this size: the sliding window is shorter than the sequences,
local and global layers alternate, two query heads share a KV head, both soft caps, tied head, pre- and post-norm, the
chat tokens at their Gemma 2 ids, digits as single tokens. Deviations: widths, depth and vocabulary; a character outside
printable ASCII is `<unk>` where Gemma 2 falls back to bytes.

Source: Gemma 2 report (arXiv 2408.00118), Table 1 and section 2; chat format: Tables 4 and 5.
"""

from __future__ import annotations

import json
import string
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.data.chat import GEMMA_TEMPLATE

from .tasks import MIXED_STYLES, dialogues, prose

__all__ = ["random_model", "random_reward_model", "save_random", "tiny_config", "tiny_tokenizer"]

Model = TypeVar("Model", bound=PreTrainedModel)

SPECIAL_IDS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 106, "<end_of_turn>": 107}
VOCABULARY = 512


# --- tokenizer ------------------------------------------------------------------------------------------------------


def _train_bpe(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Learn merges on the project's own texts. Returns the pieces (alphabet first) and the merges, in rank order."""
    tokenizer = _bpe({}, [])
    turns = (text for dialogue in islice(dialogues(MIXED_STYLES), 2000) for text in dialogue)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=["\n", "▁", *sorted(set(string.printable) - set(string.whitespace))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*turns, *islice(prose(), 500), *["user\nmodel\n"] * 500], trainer)
    pieces = tokenizer.get_vocab()
    merges = [left + right for left, right in _merges(tokenizer)]
    alphabet = sorted(set(pieces) - set(merges))
    return [*alphabet, *merges], _merges(tokenizer)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>" if vocabulary else None))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n|[^\w▁]"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return tokenizer


@lru_cache(maxsize=1)
def _backend() -> str:
    """The trained tokenizer as JSON: ordinary pieces fill the ids that the special tokens leave free."""
    pieces, merges = _train_bpe(VOCABULARY - len(SPECIAL_IDS))
    free = (index for index in range(VOCABULARY) if index not in SPECIAL_IDS.values())
    vocabulary = SPECIAL_IDS | dict(zip(pieces, free, strict=False))
    tokenizer = _bpe(dict(sorted(vocabulary.items(), key=lambda item: item[1])), merges)
    tokenizer.add_special_tokens(sorted(SPECIAL_IDS, key=SPECIAL_IDS.__getitem__))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", SPECIAL_IDS["<bos>"])]
    )
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer with Gemma 2's special tokens, ids and chat template, and a vocabulary of 512."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=GEMMA_TEMPLATE,
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


# --- networks -------------------------------------------------------------------------------------------------------


def tiny_config(**overrides: object) -> Gemma2Config:
    """A Gemma 2 configuration for unit tests (2 layers, width 16); any field can be overridden."""
    fields: JsonObject = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
        "dtype": "float32",
    }
    return Gemma2Config(**(fields | overrides))


def with_generation_config(model: Gemma2ForCausalLM) -> Gemma2ForCausalLM:
    """Both stop ids, else every sample runs to the length limit."""
    model.generation_config = GenerationConfig(
        bos_token_id=SPECIAL_IDS["<bos>"],
        eos_token_id=[SPECIAL_IDS["<eos>"], SPECIAL_IDS["<end_of_turn>"]],
        pad_token_id=SPECIAL_IDS["<pad>"],
        do_sample=True,
    )
    return model


@torch.no_grad()
def _randomised(kind: type[Model], config: Gemma2Config, seed: int) -> Model:
    """Every parameter ~ N(0, 0.2^2), norms included: no symmetry that could hide an error. Leaves torch's RNG alone."""
    with torch.random.fork_rng(devices=[]):
        model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        parameter.normal_(0.0, 0.2, generator=generator)
    result: Model = model
    return result


def random_model(seed: int = 0, **overrides: object) -> Gemma2ForCausalLM:
    """An untrained causal model for unit tests, in eval mode; `overrides` are fields of `tiny_config`."""
    return with_generation_config(_randomised(Gemma2ForCausalLM, tiny_config(**overrides), seed))


def random_reward_model(seed: int = 0, **overrides: object) -> Gemma2ForSequenceClassification:
    """An untrained reward model (one output) for unit tests, in eval mode."""
    return _randomised(Gemma2ForSequenceClassification, tiny_config(num_labels=1, **overrides), seed)


def save_random(path: Path, seed: int = 0, kind: Literal["causal", "reward"] = "causal", **overrides: object) -> Path:
    """Write an untrained model and its tokenizer as a model directory; returns `path`."""
    make = random_model if kind == "causal" else random_reward_model
    make(seed, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
