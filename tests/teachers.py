"""Teachers with random weights for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from gemma2.posttrain.models.loading import load_policy, save_model
from gemma2.posttrain.tiny.networks import save_random


def save_stopping(folder: Path, factor: float = 8.0) -> Path:
    """A model that ends most of its turns within a few dozen tokens, where an untrained one hardly ever does."""
    save_random(folder)
    model, tokenizer = load_policy(folder, device=torch.device("cpu"))
    with torch.no_grad():
        model.model.embed_tokens.weight[107] *= factor  # the head is tied: the logit of <end_of_turn> spreads
    save_model(model, tokenizer, folder)
    return folder
