"""Reward models that read token ids.

    r(x, y) = head(h_last),   h_last the last hidden state of the unchanged sequence

A reward model reads the ids that the policy wrote: decoding and encoding them again rarely gives the same tokens, and
chat templates close a truncated turn, which hides the truncation. Text is rendered again only if tokenizer or template
differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemma2.posttrain.data.chat import ChatFormat, Message
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.head import wide_linear
from gemma2.posttrain.models.loading import load_reward_model
from gemma2.posttrain.models.protocols import RewardNetwork
from gemma2.posttrain.models.sampler import evaluating
from gemma2.posttrain.models.scorer import Pace, hidden_states
from gemma2.posttrain.schemas.fields import Attention
from gemma2.posttrain.sharding.lending import opened

__all__ = ["RewardModel", "shaped_rewards"]


class RewardModel:
    """A sequence classifier with one output, read at the last token of the sequence: no template is added.

    A truncated completion therefore ends in the middle of a turn, and the model can see that.
    """

    def __init__(self, model: RewardNetwork, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_dir(cls, path: Path, dtype: torch.dtype = torch.float32, attention: Attention = "eager") -> RewardModel:
        """Load from a model directory. Raises InputError if it is not a reward model."""
        return cls(*load_reward_model(path, dtype, attention=attention))

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        batch_size: int = 32,
        pace: Pace | None = None,
    ) -> Tensor:
        """Return rewards (N,) fp32 on the CPU, from the model's own ids, whatever the order, batch size and padding.

        pace: as in `hidden_states`, for a model that runs in step with other processes.
        """
        rewards = torch.zeros(len(prompts))
        with evaluating(self.model), opened(self.model):
            for batch, hidden in hidden_states(self.model, prompts, completions, batch_size, pace):
                last = torch.tensor([len(prompts[i]) + len(completions[i]) - 1 for i in batch], device=hidden.device)
                states = hidden[torch.arange(len(batch), device=hidden.device), last]  # (B, d)
                rewards[batch] = wide_linear(states, self.model.score.weight).squeeze(-1).cpu()
        return rewards

    def score_text(
        self,
        conversations: Sequence[Sequence[Message]],
        answers: Sequence[str],
        truncated: Sequence[bool],
        batch_size: int = 32,
    ) -> Tensor:
        """Return rewards (N,) of texts from a policy with another tokenizer, rendered in this model's chat format."""
        chat = ChatFormat(self.tokenizer)
        ids = [
            chat.example([*messages, {"role": "assistant", "content": answer}], "eot", truncated=cut)[0]
            for messages, answer, cut in zip(conversations, answers, truncated, strict=True)
        ]
        return self.score(ids, [[]] * len(ids), batch_size)

    def reads(self, tokenizer: Tokenizer) -> bool:
        """Whether this model's tokenizer has the same ids and chat template as `tokenizer`."""
        return (
            self.tokenizer.get_vocab() == tokenizer.get_vocab()
            and self.tokenizer.chat_template == tokenizer.chat_template
        )


def shaped_rewards(
    rewards: Tensor, lengths: Tensor, truncated: Tensor, length_penalty: float, missing_eos_penalty: float
) -> Tensor:
    """Return r - length_penalty * tokens - missing_eos_penalty * [truncated], (N,) (WARP, App. E: 0.0005 per token)."""
    return rewards - length_penalty * lengths - missing_eos_penalty * truncated
