"""Memory that is exhausted, in one line: the phase, what was asked for, and flags of the command that take less."""

from __future__ import annotations

from gemma2.core.errors import Gemma2Error, OutOfMemory, memory_asked
from gemma2.posttrain.schemas.config import Config

__all__ = ["out_of_memory"]


def out_of_memory(error: Exception, config: Config, phase: str, kept: bool) -> OutOfMemory | None:
    """Return the error for memory that is exhausted; None for any other error, and for one that says so already.

    kept: whether there is something to resume from
    """
    asked = None if isinstance(error, Gemma2Error) else memory_asked(error)
    if asked is None:
        return None
    smaller = smaller_flags(config, on_host="cpu" in str(error).lower() or type(error) is MemoryError)
    go_on, start_over = ("continue with --resume", "start over with --force ") if kept else ("start again", "give ")
    hint = f", or {start_over}{' or '.join(smaller)}" if smaller else ""
    return OutOfMemory(
        f"{phase}: memory is exhausted, {asked}", f"free some and {go_on}{hint}; --dry-run shows what a run needs"
    )


def smaller_flags(config: Config, on_host: bool) -> list[str]:
    """Return the flags, with values, with which a command takes less memory than with its configuration."""
    found: list[str] = []
    tokens = getattr(config, "micro_batch_tokens", None)
    rows = getattr(config, "micro_batch_size", None) or _batch(config)
    if tokens:
        found.append(f"--micro-batch-tokens {max(tokens // 2, 1)}")
    elif rows > 1:
        name = "--micro-batch-size" if hasattr(config, "micro_batch_size") else "--batch-size"
        found.append(f"{name} {_less(rows)}")
    for option in ("max_new_tokens", "max_length"):
        value = getattr(config, option, None)
        if isinstance(value, int) and value > 8:
            found.append(f"--{option.replace('_', '-')} {value // 2}")
    if getattr(config, "anchor_memory", None) == "gpu" and getattr(config, "anchor", "") == "ema" and not on_host:
        found.append("--anchor-memory cpu")
    if getattr(config, "lora_rank", None) == 0:
        found.append("--lora-rank 16")
    return found


def _batch(config: Config) -> int:
    """Rows of one forward pass where no micro-batch is set."""
    prompts = getattr(config, "prompts_per_step", None)
    return prompts * getattr(config, "n", 1) if prompts else getattr(config, "batch_size", 1)


def _less(rows: int) -> int:
    """The largest number below `rows` that divides it: a batch is whole micro-batches."""
    return next(number for number in range(rows // 2, 0, -1) if rows % number == 0)
