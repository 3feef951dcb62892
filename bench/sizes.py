"""Sizes of the random Gemma 2 models that the benches of training and sampling share.

tiny is that of the embedded student; small has 16 M parameters and a vocabulary of 32k, wide the vocabulary of 256k.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SIZES"]

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def _size(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "head_dim": hidden // 4,
        "vocab_size": vocabulary,
        **HEADS,
    }


SIZES = {"tiny": _size(96, 4, 512), "small": _size(288, 6, 32_000), "wide": _size(256, 6, 256_000)}
