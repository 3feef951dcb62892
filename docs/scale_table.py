"""The table of docs/scale.md: memory of every training command on a GPU of each kind of machine, from the planner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma2.posttrain.planning.memory import Lengths, memory_of, place_for
from gemma2.posttrain.planning.shapes import SIZES, ModelShape, shape_of
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config

__all__ = ["scale"]

TOKENS = 2048  # of the longest row, prompt included
ANSWER = 1536  # of it, where a model answers
ROWS = Path("rows")
MACHINES = {"1 x 24 GB": (1, 24e9), "1 x 80 GB": (1, 80e9), "8 x 80 GB": (8, 80e9), "16 x 80 GB": (16, 80e9)}
COUNTS = (1, 2, 4, 8, 16, 32)
WORKING = 2e9  # bytes of vLLM besides weights and cache
ADAPTERS = {"all weights": {}, "LoRA": {"lora_rank": 16}, "LoRA, 4 bits": {"lora_rank": 16, "base_bits": 4}}
FACTORS = {"lora_rank": 16, "lora_anchor": "factors"}
ANCHORS = {
    "all weights": {},
    "LoRA, dense anchor": {"lora_rank": 16},
    "LoRA, anchor of factors": FACTORS,
    "LoRA, anchor of factors, 4 bits": FACTORS | {"base_bits": 4},
}
STEP = {"batch_size": 32, "micro_batch_size": 1}
Made = Callable[[int, float], Config]  # of a number of GPUs and the bytes of one


def rows() -> dict[str, Made]:
    """Name of a row -> its configuration."""
    found: dict[str, Made] = {}
    for size in SIZES:
        for form, fields in ADAPTERS.items():
            of = {"model": Path(size), "data": (ROWS,), "max_length": TOKENS, **STEP, **fields}
            found[f"sft {size.upper()}, {form}"] = _on(SftConfig(**of))
    for size, teacher in (("2b", "9b"), ("2b", "27b"), ("9b", "27b")):
        of = {"model": Path(size), "teacher": Path(teacher), "prompts": ROWS, **STEP}
        found[f"distill {size.upper()} from {teacher.upper()}"] = _on(DistillConfig(max_new_tokens=ANSWER, **of))
    for size in SIZES:
        for form, fields in ADAPTERS.items():  # a pair is two rows
            of = {"model": Path(size), "data": ROWS, "max_length": TOKENS // 2, **STEP, **fields}
            found[f"reward {size.upper()}, {form}"] = _on(RewardConfig(**of))
    for size, judge in (("2b", "2b"), ("9b", "9b"), ("27b", "9b")):
        for form, fields in ANCHORS.items():
            of = {"policy": Path(size), "prompts": ROWS, "reward": (Path(judge),), "micro_batch_size": 1, **fields}
            config = RlhfConfig(max_new_tokens=ANSWER, n=4, prompts_per_step=32, **of)
            name = f"rlhf {size.upper()}, reward model {judge.upper()}, {form}"
            found[name] = _on(config)
            if size != "2b" and "base_bits" not in fields:
                found[f"{name}, vLLM"] = _on(config, _vllm(SIZES[size]))
    return found


def _vllm(shape: ModelShape) -> Callable[[int, float], dict[str, Any]]:
    """vLLM in the training processes, over the GPUs of a machine, with a cache of 64 x 2048 tokens in bf16."""
    cache = 64 * TOKENS * shape.layers * shape.groups * shape.head_dim * 2 * 2

    def further(gpus: int, capacity: float) -> dict[str, Any]:
        parallel = min(gpus, 8)
        held = (2 * shape.parameters + cache) / parallel + WORKING
        return {"engine": "vllm", "vllm_tensor_parallel": parallel, "vllm_memory": held / capacity}

    return further


def _on(config: Config, further: Callable[[int, float], dict[str, Any]] = lambda gpus, capacity: {}) -> Made:
    """A configuration on some GPUs, eight to a machine, with attention that keeps no scores."""

    def made(gpus: int, capacity: float) -> Config:
        launched = {"gpus": min(gpus, 8), "nodes": -(-gpus // 8), "attention": "flex_attention"}
        return config.model_copy(update=launched | further(gpus, capacity))

    return made


def scale() -> str:
    """The table: GB on each GPU, with the strategy; the fewest GPUs of 80 and of 24 GB that are enough."""
    head = ["command", *MACHINES, "fewest of 80 GB", "fewest of 24 GB"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for name, made in rows().items():
        cells = [_cell(made, gpus, capacity) for gpus, capacity in MACHINES.values()]
        lines.append(f"| {name} | {' | '.join([*cells, _fewest(made, 80e9), _fewest(made, 24e9)])} |")
    return "\n".join(lines)


def needed(made: Made, gpus: int, capacity: float) -> tuple[float, bool]:
    """Bytes on each GPU by `--strategy auto`, and whether it divides the models."""
    config = made(gpus, capacity)
    place = place_for(config, shape_of, Lengths(row=TOKENS), "accelerator", capacity)
    plan = memory_of(config, shape_of, place, Lengths(row=TOKENS))
    if plan is None:
        raise ValueError(f"no plan for {type(config).__name__}")
    return plan.peak.bytes, place.full_shard


def _cell(made: Made, gpus: int, capacity: float) -> str:
    count, divided = needed(made, gpus, capacity)
    shown = f"{count / 1e9:.3g}" if count < 100e9 else f"{count / 1e9:.0f}"
    if count > capacity:
        return f"no: {shown}"
    return shown if gpus == 1 else f"{shown} {'fsdp' if divided else 'ddp'}"


def _fewest(made: Made, capacity: float) -> str:
    enough = (str(gpus) for gpus in COUNTS if needed(made, gpus, capacity)[0] <= capacity)
    return next(enough, f"more than {COUNTS[-1]}")
