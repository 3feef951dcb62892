"""Pre-training of the embedded models from scratch, on the project's own dialogues and prose.

    loss = mean of -log p(token | before) over prose, and over the answers of the dialogues

AdamW, linear warm-up, constant, linear decay over the last 60 % of the steps; batches of like length. On one CPU thread
in fp32 the result is a function of the recipe alone on one machine and torch build; another processor may round
differently and end with other bytes.

The student sees every answer style, unwanted ones too; the teacher is larger and sees nearly only the three that some
topic wants. Deviations from the Gemma 2 report (section 3): its 2B and 9B are distilled, these are not; questions
are not targets here, since which question comes next cannot be learned and small batches are better spent on answers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma2ForCausalLM

from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.models.attention import causal_masks
from gemma2.posttrain.models.head import head_logits

from .networks import tiny_config, tiny_tokenizer, with_generation_config
from .tasks import GOOD_STYLES, MIXED_STYLES, dialogues, prose

__all__ = ["RECIPES", "TinySize", "learning_rate_at", "pretrain"]

HEADS = 4
WARMUP = 30  # optimizer steps
DECAYING = 0.6  # share of the steps over which the learning rate falls
LEAST = 0.02  # of the peak learning rate
SORTED_TOGETHER = 32  # batches of texts that are sorted by length among themselves


@dataclass(frozen=True)
class TinySize:
    """Size of a network and how it is trained."""

    hidden: int
    feedforward: int
    layers: int
    head: int
    steps: int
    styles: Mapping[str, float] = field(default_factory=lambda: MIXED_STYLES)
    batch: int = 16  # texts per optimizer step
    learning_rate: float = 3e-3
    prose: float = 0.2  # share of texts that are not dialogues
    window: int = 16  # tokens that a local layer sees; the texts are longer

    def widened(self, width: int) -> TinySize:
        """The same network at another width; the learning rate falls with it, as Adam's should (arXiv 2203.03466)."""
        share = width / self.hidden
        return replace(
            self,
            hidden=width,
            head=width // HEADS,
            feedforward=round(self.feedforward * share),
            learning_rate=self.learning_rate / share,
        )

    def network(self) -> Gemma2ForCausalLM:
        """The untrained network: HEADS query heads on half as many KV heads."""
        config = tiny_config(
            hidden_size=self.hidden,
            intermediate_size=self.feedforward,
            num_hidden_layers=self.layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            head_dim=self.head,
            query_pre_attn_scalar=self.head,
            sliding_window=self.window,
            initializer_range=0.1,
        )
        return with_generation_config(Gemma2ForCausalLM(config))


RECIPES = {
    "student": TinySize(hidden=96, feedforward=256, layers=4, head=24, steps=600, learning_rate=3e-3),
    "teacher": TinySize(
        hidden=160, feedforward=384, layers=3, head=40, steps=600, learning_rate=2e-3, styles=GOOD_STYLES
    ),
}
Text = tuple[list[int], list[bool]]  # token ids, and which of them are learned


def texts(recipe: TinySize, seed: int) -> Iterator[Text]:
    """Endless texts: a dialogue from <bos> to <end_of_turn><eos>, or prose from <bos> to <eos>.

    Of a dialogue only the answer is learned: a network of this size learns nothing from the question.
    """
    tokenizer = tiny_tokenizer()
    rng = random.Random(f"mixture/{seed}")
    spoken, written = dialogues(recipe.styles, seed), prose(seed)
    encode = partial(tokenizer, add_special_tokens=False)
    while True:
        if rng.random() < recipe.prose:
            body = encode(next(written))["input_ids"]
            yield [tokenizer.bos_token_id, *body, tokenizer.eos_token_id], [True] * (len(body) + 2)
            continue
        prompt, answer = next(spoken)
        asked = encode(f"<bos><start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n")["input_ids"]
        answered = encode(f"{answer}<end_of_turn><eos>")["input_ids"]
        yield asked + answered, [False] * len(asked) + [True] * len(answered)


def batches(recipe: TinySize, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches: right-padded ids (B, T), and a mask (B, T) of what is learned. Texts of like length together."""
    source, rng = texts(recipe, seed), random.Random(f"batches/{seed}")
    left = recipe.steps
    while left > 0:
        count = min(SORTED_TOGETHER, left)
        chunk = sorted(islice(source, count * recipe.batch), key=lambda text: len(text[0]))
        grouped = [chunk[i : i + recipe.batch] for i in range(0, len(chunk), recipe.batch)]
        rng.shuffle(grouped)
        for group in grouped:
            width = max(len(ids) for ids, _ in group)
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group])
            mask = torch.tensor([learned + [False] * (width - len(learned)) for _, learned in group])
            yield ids, mask
        left -= count


def learning_rate_at(step: int, recipe: TinySize) -> float:
    """Linear warm-up, constant, linear decay to 2 % of the peak. Steps count from 0."""
    falling = (recipe.steps - step) / (DECAYING * recipe.steps)
    return recipe.learning_rate * min(1.0, (step + 1) / WARMUP) * max(LEAST, min(1.0, falling))


def next_token_loss(model: Gemma2ForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy over the targets, nats, soft cap included. ids, mask: (B, T), padded on the right."""
    hidden = model.base_model(
        input_ids=ids[:, :-1], attention_mask=causal_masks(model, ids.shape[1] - 1), use_cache=False
    ).last_hidden_state  # (B, T - 1, d)
    target = mask[:, 1:]
    return F.cross_entropy(head_logits(model, hidden[target]), ids[:, 1:][target])


def pretrain(
    recipe: TinySize, seed: int = 0, progress: Progress = SILENT, label: str = "pre-training"
) -> Gemma2ForCausalLM:
    """Train one network from scratch; returns it in eval mode. Uses one thread, and leaves torch's own RNG alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = recipe.network().train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        with progress.task(label, total=recipe.steps, unit="steps") as task:
            for step, (ids, mask) in enumerate(batches(recipe, seed)):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, recipe)
                loss = next_token_loss(model, ids, mask)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                task.advance(1, loss=loss.item())
        return model.eval()
    finally:
        torch.set_num_threads(threads)
