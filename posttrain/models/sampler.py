"""On-policy sampling with a shared prefill: n completions per prompt, exact draws, log-probs kept.

    y_t ~ pi(. | x, y_<t),   pi = softmax(logits / temperature)          (WARP 2406.16768, Algorithm 1, line 5)

Every prompt is prefilled once; its keys and values are then repeated for the n samples of its group, and rows leave
the batch and the cache as soon as they end; on an accelerator when half of them has ended (`replayed/static_rows.py`).
Drawing inverts the distribution function on float64 uniforms that are all taken from the generator beforehand, one per
token slot, so the draws of a row depend on neither the batch size nor the other rows. Gemma 2 and the Llama family
decode through `decoder.py`, other architectures through transformers.

Log-probs belong to the sampled distribution, softmax(logits / temperature) over the full vocabulary. That is the policy
of the RL objective, so they serve as its log pi without a second forward pass. Under top-k, top-p or min-p they still
describe the untruncated policy; at temperature 0 (greedy) they are those of temperature 1.

Prefill and decoding use prebuilt masks, so a model that was loaded with flash or flex attention decodes with eager
attention.

Deviation from `transformers.generate`: none in the greedy tokens (test_sampler.py, with left padding, a sliding window
shorter than the sequence and both soft caps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemma2.core.errors import InputError

from .attention import additive, empty_cache, layer_masks, padded_masks, taking_masks
from .decoder import DecodingWeights, StepDecoder, precision
from .head import last_logits
from .protocols import CausalLM, Network
from .replayed.captured_step import capture_on
from .replayed.static_rows import Opening, decode_static

__all__ = ["Completions", "SamplingParams", "decode", "evaluating", "length_batches", "random_numbers", "sample"]

RANKED = 1024  # tokens that top-p ranks first
WIDE = 4096  # vocabularies of this size and more are searched in blocks
BLOCK = 512  # tokens
Ends = Callable[[list[int]], bool]
TILE = 2**22  # logits at once: 16 MiB, which stay in the caches


@dataclass(frozen=True)
class SamplingParams:
    """How to draw. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 leave the distribution whole."""

    max_new_tokens: int
    temperature: float = 1.0
    n: int = 1
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass
class Completions:
    """Samples in prompt-major order: the n of prompt 0 first.

    ids: tokens of each completion, including the stop token if one was drawn.
    logps: nats, log pi(token) at the sampling temperature, one per token of `ids`.
    truncated: True if the limit came before a stop token.
    prompt_index: index of the prompt that each completion answers.
    """

    ids: list[list[int]] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    prompt_index: list[int] = field(default_factory=list)


@torch.no_grad()
def sample(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    uniforms: Tensor | None = None,
) -> Completions:
    """Draw `params.n` completions for each prompt (token ids, no padding).

    `generator` (CPU) decides every draw; a resume needs only its state. `uniforms` replaces it by the numbers that
    `random_numbers` returned for these completions. `batch_size` counts completions; a group is never split, so a batch
    has at least one whole group. Raises InputError for an empty prompt.
    """
    if any(not prompt for prompt in prompts):
        raise InputError("a prompt has no tokens", "remove empty prompts")
    if uniforms is None:
        uniforms = random_numbers(len(prompts) * params.n, params, generator)
    rows: dict[int, tuple[list[int], list[float], bool]] = {}
    with evaluating(model):
        weights = DecodingWeights.of(model)
        for batch in length_batches([len(prompt) for prompt in prompts], max(1, batch_size // params.n)):
            slots = [index * params.n + k for index in batch for k in range(params.n)]
            asked = [prompts[slot // params.n] for slot in slots]
            drawn = decode(model, asked, params, stop_ids, pad_id, uniforms[slots], weights=weights)
            rows.update(zip(slots, drawn, strict=True))
    ordered = [rows[slot] for slot in range(len(rows))]
    return Completions(
        ids=[ids for ids, _, _ in ordered],
        logps=[logps for _, logps, _ in ordered],
        truncated=[truncated for _, _, truncated in ordered],
        prompt_index=[slot // params.n for slot in range(len(rows))],
    )


def random_numbers(rows: int, params: SamplingParams, generator: torch.Generator | None) -> Tensor:
    """Return the uniforms (rows, max_new), float64 in [0, 1), that `rows` completions are drawn with."""
    return torch.rand(rows, params.max_new_tokens, dtype=torch.float64, generator=generator)


def length_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices in batches of `size`, longest first: little padding, and lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


@contextmanager
def evaluating(model: Network) -> Iterator[None]:
    """Switch off dropout and gradient checkpointing, which would disable the cache, while the context is open."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


@torch.no_grad()
def decode(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    stop_ids: Sequence[int],
    pad_id: int,
    uniforms: Tensor,
    ends: Ends | None = None,
    weights: DecodingWeights | None = None,
) -> list[tuple[list[int], list[float], bool]]:
    """Decode one batch: (ids, logps, truncated) for each prompt; repeated prompts are prefilled once.

    uniforms: (rows, max_new) float64 in [0, 1), the random numbers of each row. `params.n` is not read.
    ends: whether a row is complete, by its ids so far; asked after every token, next to the stop ids.
    weights: those of the model for decoding, if they serve several batches; default: they are made for this one.
    """
    with taking_masks(model):
        batch = _Batch(model, prompts, params, pad_id, weights)
        return _decode(batch, params, stop_ids, pad_id, uniforms.to(model.device), ends)


def _decode(
    batch: _Batch, params: SamplingParams, stop_ids: Sequence[int], pad_id: int, uniforms: Tensor, ends: Ends | None
) -> list[tuple[list[int], list[float], bool]]:
    model, device = batch.model, uniforms.device
    stops = torch.zeros(int(model.config.vocab_size), dtype=torch.bool, device=device)
    stops[torch.tensor([i for i in stop_ids if i < len(stops)], dtype=torch.long, device=device)] = True
    if batch.decoder is not None and fixed_shapes(device):
        step, capture = batch.decoder.step_through, capture_on(device)
        return decode_static(
            batch.opening(uniforms, stops), step, lambda logits, u: draw(logits, u, params), capture, pad_id, ends
        )
    tokens = torch.full(uniforms.shape, pad_id, dtype=torch.long, device=device)  # (rows, max_new)
    logps = torch.zeros(uniforms.shape, dtype=torch.float32, device=device)
    lengths = torch.full((len(uniforms),), params.max_new_tokens, device=device)
    ended = torch.zeros(len(uniforms), dtype=torch.bool, device=device)
    live = torch.arange(len(uniforms), device=device)  # numbers of the rows that are still in the batch
    for t in range(params.max_new_tokens):
        drawn, logp = draw(batch.logits, uniforms[live, t], params)
        tokens[live, t], logps[live, t] = drawn, logp
        stopped = stops[drawn]
        if ends is not None:
            said = [ends(tokens[row, : t + 1].tolist()) for row in live.tolist()]
            stopped = stopped | torch.tensor(said, device=device)
        if stopped.any():
            lengths[live[stopped]], ended[live[stopped]] = t + 1, True
            keep = (~stopped).nonzero().squeeze(1)
            live, drawn = live[keep], drawn[keep]
            if not len(live):
                break
            batch.keep(keep)
        if t + 1 < params.max_new_tokens:
            batch.step(drawn)
    return [
        (ids[:length], values[:length], not done)
        for ids, values, length, done in zip(
            tokens.tolist(), logps.tolist(), lengths.tolist(), ended.tolist(), strict=True
        )
    ]


def fixed_shapes(device: torch.device) -> bool:
    """Whether decoding keeps its shapes for many tokens (`replayed/`). A CPU drops rows at once: it never waits."""
    return device.type != "cpu"


def draw(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw tokens (B,) with log-probs (B,) fp32 from logits (B, V) and one float64 uniform u per row in [0, 1).

    The token is the first whose cumulative probability exceeds u: exact up to rounding, with one random number per row
    (Gumbel-max needs V).
    """
    if params.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, log_softmax_at(logits, tokens)
    if logits.shape[1] >= WIDE and params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        rows = max(1, TILE // logits.shape[1])
        drawn = [
            _draw_in_blocks(some, own, params.temperature)
            for some, own in zip(torch.split(logits, rows), torch.split(uniforms, rows), strict=True)
        ]
        return torch.cat([tokens for tokens, _ in drawn]), torch.cat([logps for _, logps in drawn])
    logits = logits if params.temperature == 1 else logits / params.temperature
    probs = torch.softmax(logits.double(), -1)
    cumulative = truncated_mass(probs, params).cumsum(-1)  # (B, V) float64
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log().float()


def _draw_in_blocks(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw from a wide vocabulary: first the block in which the cumulative probability exceeds u, then the token.

    Only the sums of the blocks and one block per row are accumulated in float64; the rest is one pass in fp32.
    """
    vocabulary = logits.shape[1]
    blocks = -(-vocabulary // BLOCK)
    mode = logits.amax(-1, keepdim=True)
    masses = logits.new_zeros(len(logits), blocks * BLOCK)  # exp(x - mode), 0 past the vocabulary
    torch.sub(logits, mode, out=masses[:, :vocabulary]).div_(temperature).exp_()
    masses = masses.view(len(logits), blocks, BLOCK)
    cumulative = masses.sum(-1).double().cumsum(-1)  # (B, blocks)
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, _below(total))
    block = torch.searchsorted(cumulative, target, right=True)  # (B, 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = masses[torch.arange(len(logits), device=logits.device), block.squeeze(1)].double().cumsum(-1)
    # The fp32 sum of a block may exceed its float64 sum by a rounding error: stay below it, at a token that has mass.
    rest = torch.minimum(target - before, _below(inside[:, -1:]))
    tokens = block * BLOCK + torch.searchsorted(inside, rest, right=True)
    logps = ((logits.gather(1, tokens) - mode) / temperature).double() - total.log()
    return tokens.squeeze(1), logps.squeeze(1).float()


def _below(values: Tensor) -> Tensor:
    """Return the next smaller numbers of positive numbers."""
    return torch.nextafter(values, torch.zeros_like(values))


def log_softmax_at(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log softmax(logits)[token], (B,) fp32."""
    return torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None]).squeeze(1).float()


def truncated_mass(probs: Tensor, params: SamplingParams) -> Tensor:
    """Zero the tokens that top-k, top-p and min-p exclude, never the most probable. probs: (B, V), not renormalised.

    Top-k keeps every token at least as probable as the k-th. Top-p keeps the smallest set of most probable tokens that
    reaches the share `top_p` of the mass that top-k has left. Min-p keeps the tokens whose probability is at least
    `min_p` times the largest one (2407.01082), after the others, as in transformers; vLLM applies it before them.
    """
    if params.top_k > 0:
        floor = probs.topk(min(params.top_k, probs.shape[1])).values[:, -1:]
        probs = probs.where(probs >= floor, 0.0)
    if params.top_p < 1:
        target = params.top_p * probs.sum(-1, keepdim=True)
        ranked, order = _most_probable(probs, target)
        before = ranked.cumsum(-1) - ranked  # mass of the more probable tokens
        inside = before < target
        inside[:, 0] = True
        probs = torch.zeros_like(probs).scatter_(1, order, ranked.where(inside, 0.0))
    if params.min_p > 0:
        probs = probs.where(probs >= params.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


def _most_probable(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (probabilities, tokens) in falling order, enough of them for the mass `target` (B, 1) in every row.

    Sorting a whole vocabulary costs more than a step of a small model, and the first `RANKED` nearly always suffice.
    With fixed shapes all are sorted: to see whether the first suffice would wait for the device.
    """
    size = probs.shape[1] if fixed_shapes(probs.device) else min(RANKED, probs.shape[1])
    ranked, order = probs.topk(size)
    if size < probs.shape[1] and bool((ranked.sum(-1, keepdim=True) < target).any()):
        ranked, order = probs.sort(descending=True)
    return ranked, order


class _Batch:
    """The rows that are still being decoded: cache, padding mask, positions and the logits of the next token."""

    def __init__(
        self,
        model: CausalLM,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        pad_id: int,
        weights: DecodingWeights | None = None,
    ) -> None:
        self.model = model
        self.cache = empty_cache(model.config, precision(model))
        groups = dict.fromkeys(map(tuple, prompts))
        number = {prompt: index for index, prompt in enumerate(groups)}
        source = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=model.device)  # (rows,) in 0..P-1
        self.length = max(len(prompt) for prompt in groups)  # columns in use, padding included
        padding = torch.tensor([self.length - len(prompt) for prompt in groups], device=model.device)  # (P,) columns
        ids = torch.tensor([[pad_id] * (self.length - len(p)) + list(p) for p in groups], device=model.device)
        columns = torch.arange(self.length + params.max_new_tokens, device=model.device)
        visible = columns >= padding[:, None]  # (P, all columns)
        positions = (columns[: self.length] - padding[:, None]).clamp_(min=0)
        logits = last_logits(model, self.cache, ids, positions, padded_masks(model, visible[:, : self.length]))
        if len(groups) < len(prompts):
            self.cache.batch_select_indices(source)
        self.logits = logits[source]  # (rows, V) fp32
        self.position = (self.length - padding)[source]  # (rows,) of the next token
        self.mask = additive(visible[:, None, None], model.dtype)[source]  # (rows, 1, 1, all columns)
        self.decoder = StepDecoder(model, len(columns), weights) if weights or StepDecoder.fits(model) else None

    def step(self, tokens: Tensor) -> None:
        """Feed one token (B,) to every row."""
        self.length += 1
        mask = self.mask[..., : self.length]
        if self.decoder is not None:
            self.logits = self.decoder.step(self.cache, tokens, self.position, mask)
        else:
            masks = layer_masks(self.model.config, mask)
            self.logits = last_logits(self.model, self.cache, tokens[:, None], self.position[:, None], masks)
        self.position = self.position + 1

    def opening(self, uniforms: Tensor, stops: Tensor) -> Opening:
        """Hand the prefill over to the decoder with fixed shapes; this object is not used further."""

        def emptied() -> Iterator[tuple[int | None, Tensor, Tensor]]:
            while layers:  # one layer at a time is there twice
                layer = layers.pop(0)
                yield layer.window, layer.keys, layer.values

        layers = self.cache.layers
        return Opening(self.logits, self.position, self.mask, uniforms, stops, self.length, emptied())

    def keep(self, rows: Tensor) -> None:
        """Drop every row that is not in `rows` (B',)."""
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]
