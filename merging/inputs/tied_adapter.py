"""Adapters of an embedding that is tied to the output head, as peft writes them with `ensure_weight_tying`.

peft trains one tensor for both and saves it twice, under the name of the embedding and of the head. A base that ties
the two stores it once.
"""

from __future__ import annotations

from dataclasses import replace

from .adapter import Adapter
from .architecture import LM_HEAD
from .checkpoint import Checkpoint

__all__ = ["EMBEDDING_ENDS", "head_name", "without_tied_head"]

EMBEDDING_ENDS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def head_name(model: Checkpoint) -> str:
    """Return the name of the output head of a language model, stored or not."""
    return "embed_out.weight" if model.config.get("model_type") == "gpt_neox" else LM_HEAD


def without_tied_head(adapter: Adapter, model: Checkpoint) -> Adapter:
    """Return the adapter without the second copy of an embedding that is the head of its model too."""
    head = head_name(model)
    tied = bool(adapter.config.get("ensure_weight_tying")) and head not in model.tensors
    if not tied or not any(name.endswith(EMBEDDING_ENDS) for name in adapter.replaced):
        return adapter
    return replace(adapter, replaced={name: one for name, one in adapter.replaced.items() if name != head})
