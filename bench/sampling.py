"""Tokens per second of our sampler beside transformers' `generate`, in one run, on the same model and prompts.

    python bench/sampling.py [--size small|tiny|smollm2 ...] [--rounds 3]

Workloads: distinct prompts of 20 to 300 tokens; 8 samples each of prompts of 300 tokens; and of smollm2, a Llama of
135M with random weights, the rollout of an RL step: 4 samples each of 8 prompts of 40 tokens, 64 new ones, in one
batch. In each, completions either all run to the limit or end at random (half of the limit on average, by a set of
stop tokens). Peers: `generate` on left-padded batches in the given order, and the same on prompts sorted by length.
`generate` gets what suits it best: eager attention (Gemma 2 takes no other on a CPU; Llama: sdpa), its own cache,
`num_return_sequences` for samples of one prompt, pure sampling without top-k. They take turns, so that a busy machine
slows all. Figures: medians of seconds per 1000 drawn tokens, CPU and wall; ratios: peer / ours. fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sizes import SIZES
from transformers import LlamaConfig, LlamaForCausalLM

from gemma2.posttrain.models.sampler import SamplingParams, length_batches, sample
from gemma2.posttrain.tiny.networks import random_model

WINDOW = {"sliding_window": 128, "max_position_embeddings": 1024}
PAD = 0
Work = Callable[[], int]  # returns the tokens that it drew


def stop_ids(vocab: int, limit: int, ends: bool) -> list[int]:
    """Stop tokens that a near-uniform model draws after half of the limit on average; or none that it will draw."""
    if not ends:
        return []
    count = max(1, round(2 * vocab / limit))
    return list(range(vocab - count, vocab))


def ours(model: Any, prompts: list[list[int]], limit: int, n: int, stops: list[int], batch: int) -> Work:
    def work() -> int:
        drawn = sample(model, prompts, SamplingParams(limit, n=n), stops, PAD, None, batch)
        return sum(map(len, drawn.ids))

    return work


def theirs(model: Any, prompts: list[list[int]], limit: int, n: int, stops: list[int], batch: int, sort: bool) -> Work:
    rows = max(1, batch // n)
    order = [list(range(i, min(i + rows, len(prompts)))) for i in range(0, len(prompts), rows)]
    if sort:
        order = list(length_batches([len(prompt) for prompt in prompts], rows))

    def work() -> int:
        tokens = 0
        for indices in order:
            chosen = [prompts[i] for i in indices]
            width = max(map(len, chosen))
            ids = torch.tensor([[PAD] * (width - len(p)) + p for p in chosen])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chosen])
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                num_return_sequences=n,
                max_new_tokens=limit,
                eos_token_id=stops or None,
                pad_token_id=PAD,
            )
            tokens += sum(drawn_length(row, stops) for row in out[:, width:].tolist())
        return tokens

    return work


def drawn_length(row: list[int], stops: list[int]) -> int:
    """Tokens up to and with the first stop token."""
    ends = set(stops)
    return next((i + 1 for i, token in enumerate(row) if token in ends), len(row))


def measure(works: dict[str, Work], rounds: int) -> dict[str, tuple[float, float]]:
    """(CPU, wall) seconds per 1000 tokens of each, medians."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            thousands = work() / 1000
            spent = time.process_time() - cpu, time.perf_counter() - wall
            figures[name].append((spent[0] / thousands, spent[1] / thousands))
    return {
        name: (statistics.median(cpu for cpu, _ in values), statistics.median(wall for _, wall in values))
        for name, values in figures.items()
    }


def workload(kind: str, vocab: int) -> tuple[list[list[int]], int]:
    """(prompts, samples of each)."""
    generator = torch.Generator().manual_seed(1)
    if kind == "rollout":
        lengths, n = [40] * 8, 4
    elif kind == "distinct":
        lengths, n = torch.randint(20, 301, (32,), generator=generator).tolist(), 1
    else:
        lengths, n = [300] * 4, 8
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths], n


def line(size: str, model: Any, kind: str, ends: bool, options: argparse.Namespace) -> str:
    """One row of the table."""
    vocab = model.config.vocab_size
    prompts, n = workload(kind, vocab)
    limit, batch = (64, 32) if kind == "rollout" else (options.limit, options.batch)
    given = (limit, n, stop_ids(vocab, limit, ends), batch)
    works = {
        "ours": ours(model, prompts, *given),
        "plain": theirs(model, prompts, *given, False),
        "sorted": theirs(model, prompts, *given, True),
    }
    ours(model, prompts[:2], 2, n, [], batch)()  # warm-up
    theirs(model, prompts[:2], 2, n, [], batch, True)()
    found = measure(works, options.rounds)
    cells = [
        f"{size}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        {"distinct": "32 distinct, 20-300", "grouped": "4 x 8 samples, 300", "rollout": "8 x 4 samples, 40"}[kind],
        "end at random" if ends else f"all {limit}",
        *(f"{seconds:.3f}" for seconds in found["ours"]),
        *(f"{found[name][i] / found['ours'][i]:.2f}x" for name in ("plain", "sorted") for i in (0, 1)),
    ]
    return f"| {' | '.join(cells)} |"


def smollm2() -> LlamaForCausalLM:
    """The shape of SmolLM2-135M, a Llama, with random weights."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", default=["small", "tiny"], choices=[*SIZES, "smollm2"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=48, help="completion limit, tokens")
    parser.add_argument("--batch", type=int, default=16, help="completions at once")
    options = parser.parse_args()
    print("| model | prompts | completions | ours CPU s | ours wall s | generate, CPU | wall | sorted, CPU | wall |")
    print("| --- " * 9 + "|")
    for size in options.size:
        model = smollm2() if size == "smollm2" else random_model(0, **WINDOW, **SIZES[size]).eval()
        for kind in ("rollout",) if size == "smollm2" else ("distinct", "grouped"):
            for ends in (False, True):
                print(line(size, model, kind, ends, options), flush=True)


if __name__ == "__main__":
    main()
