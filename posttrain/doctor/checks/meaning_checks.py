"""What only a run of the model shows: whether weights and tokenizer belong together, and whether answers end."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import load_policy, load_reward_model, quiet_libraries
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import SamplingParams, sample
from gemma2.posttrain.models.scorer import token_logps

from .finding import Diagnosis, fine, problem, warning
from .subject import Subject

__all__ = ["loss", "scores"]

# Plain sentences that any language model of English finds likelier than chance.
SENTENCES = (
    "The sun rises in the east and sets in the west.",
    "She opened the door and walked into the room.",
    "Water boils at one hundred degrees.",
    "He went to the shop to buy some bread and milk.",
    "There are seven days in a week.",
    "The children played in the garden all day.",
    "It was raining, so we stayed at home.",
    "My brother is two years older than me.",
    "The train leaves at ten in the morning.",
    "Please write your name at the top of the page.",
    "The cat slept on the chair by the window.",
    "We had a good time at the party last night.",
    "He did not know what to say.",
    "A year has twelve months.",
    "The book on the table is mine.",
    "Two and two make four.",
    "They live in a small house near the river.",
    "I would like a cup of tea, please.",
    "The teacher asked the students a question.",
    "Birds can fly, but most dogs cannot.",
)
QUESTIONS = ("What is 2 plus 3?", "Say hello.", "What color is the sky?", "Name one animal.")
PLAIN_WORDS = frozenset(re.findall(r"[a-z]+", " ".join((*SENTENCES, *QUESTIONS)).lower()))
WORD_SHARE = 0.25  # of an answer's words: an embedded model's own have 0.6 and more, another tokenizer's 0
STOP_SHARE = 0.01  # probability of a stop token after a finished answer that a tuned model exceeds


@dataclass(frozen=True)
class OwnAnswers:
    """The model's own greedy answers.

    ended  how many of them ended within the limit
    stop   the largest probability of a stop token at any position
    loss   nats a token of their texts, tokenised again
    words  share of their words that are plain English

    A large loss shows tokens that do not belong to the weights, but a small one shows nothing: whatever tokens a model
    writes, most tokenizers read their text back as the same tokens. Then only the words tell.
    """

    ended: int
    stop: float
    loss: float
    words: float

    @property
    def in_words(self) -> bool:
        """Whether the model says something in words, and finds it likely: it is trained, in these tokens."""
        return self.ended > 0 and self.words >= WORD_SHARE


def loss(subject: Subject) -> Iterator[Diagnosis]:
    """Loss on plain sentences, and on the model's own answers; whether those end."""
    quiet_libraries()
    try:
        model, tokenizer = load_policy(subject.path)
    except InputError as error:
        yield problem(error.what, error.hint)
        return
    tuned = bool(tokenizer.chat_template)  # a pre-trained model has none, and does not end turns
    rows = [tokenizer.encode(text) for text in SENTENCES]
    plain = _loss(model, [row[:1] for row in rows], [row[1:] for row in rows])
    answers = _answers(model, tokenizer) if tuned and math.isfinite(plain) else None
    uniform = math.log(len(tokenizer))
    figures = f"{plain:.2f} nats a token on plain sentences, a uniform guess {uniform:.2f}"
    if not math.isfinite(plain):
        yield problem(f"the loss is {plain}", "use the checkpoint before it")
    elif plain < uniform:
        yield fine(figures)
    elif answers is not None and answers.in_words and answers.loss < uniform / 2:
        yield warning(
            f"{figures}, its own answers {answers.loss:.2f}: trained on little but one kind of text",
            "nothing, if that was meant; else train with a smaller learning rate, or merge towards the init",
        )
    else:
        yield problem(
            f"{figures} (ratio {plain / uniform:.2f}): weights and tokenizer do not belong together, or are untrained",
            "use the tokenizer that the weights were trained with",
        )
    if answers is not None:
        yield from _ends(answers)


def _loss(model: CausalLM, prompts: list[list[int]], completions: list[list[int]]) -> float:
    return -float(torch.cat(token_logps(model, prompts, completions)).mean())


def _answers(model: CausalLM, tokenizer: Tokenizer) -> OwnAnswers | None:
    try:
        form = ChatFormat(tokenizer, getattr(model, "generation_config", None))
    except InputError:
        return None
    prompts = [form.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS]
    params = SamplingParams(max_new_tokens=48, temperature=0)
    done = sample(model, prompts, params, form.stop_ids, tokenizer.pad_token_id or 0)
    again = [tokenizer.encode(form.decode(ids), add_special_tokens=False) for ids in done.ids]
    pairs = [(prompt, ids) for prompt, ids in zip(prompts, again, strict=True) if ids]
    with torch.no_grad():
        stops = [_stop_probability(model, *pair, form.stop_ids) for pair in zip(prompts, done.ids, strict=True)]
    again_loss = _loss(model, [prompt for prompt, _ in pairs], [ids for _, ids in pairs]) if pairs else math.inf
    said = re.findall(r"\S+", " ".join(form.decode(ids) for ids in done.ids).lower())
    words = sum(word.strip(".,;:!?\"'()") in PLAIN_WORDS for word in said) / max(1, len(said))
    return OwnAnswers(sum(not cut for cut in done.truncated), max(stops), again_loss, words)


def _ends(answers: OwnAnswers) -> Iterator[Diagnosis]:
    total = len(QUESTIONS)
    figures = f"{answers.ended} of {total} greedy answers end within 48 tokens; largest probability of a stop"
    if answers.stop < STOP_SHARE:
        fix = "train with the end of turn, or check the stop ids"
        yield warning(f"{figures} {answers.stop:.2g}: the model does not end its turns", fix)
    else:
        yield fine(f"{figures} {answers.stop:.2g}")


def _stop_probability(model: CausalLM, prompt: list[int], ids: list[int], stops: list[int]) -> float:
    """The largest probability of a stop token at any position of an answer."""
    row = torch.tensor([[*prompt, *ids]], device=model.device)
    logits = model(row).logits[0, len(prompt) - 1 :].float()
    return float(logits.softmax(-1)[:, stops].sum(-1).max())


def scores(subject: Subject) -> Iterator[Diagnosis]:
    """Scores of a reward model: not constant, and the same whatever stands next to a text or pads it."""
    quiet_libraries()
    try:
        model, tokenizer = load_reward_model(subject.path)
    except InputError as error:
        yield problem(error.what, error.hint)
        return
    rows = [tokenizer.encode(text) for text in SENTENCES]
    alone = []
    together: dict[str, list[float]] = {}
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row], device=model.device)
            alone.append(float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]))
        for side in ("left", "right"):
            batch = tokenizer.pad([{"input_ids": row} for row in rows], padding_side=side, return_tensors="pt")
            out = model(
                input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device)
            )
            together[side] = out.logits[:, 0].tolist()
    spread = max(alone) - min(alone)
    if not all(map(math.isfinite, alone)):
        yield problem("scores are not finite", "use the checkpoint before it")
    elif spread == 0:
        yield problem("all sentences get the same score", "train it with gemma2 reward")
    else:
        yield fine(f"scores from {min(alone):.3g} to {max(alone):.3g}")
    for side, values in together.items():
        off = max(abs(one - other) for one, other in zip(alone, values, strict=True))
        if off > 1e-3 * max(1.0, spread):
            yield problem(
                f"scores change by up to {off:.2g} when rows are padded on the {side}",
                "set pad_token_id in config.json to that of the tokenizer",
            )
        else:
            yield fine(f"the same within {off:.1g} when padded on the {side}")
