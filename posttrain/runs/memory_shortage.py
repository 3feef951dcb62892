"""Memory that is exhausted, in one line: what ran, bytes asked, what was resident by part, and flags with less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gemma2.core.errors import Gemma2Error, OutOfMemory, memory_asked
from gemma2.core.sizes import size
from gemma2.posttrain.schemas.config import Config

from .resident import Holds, activity, in_use, resident

__all__ = ["MemoryRecord", "out_of_memory", "smaller_flags"]

Advice = Callable[[Config], str]  # flags with which a command fits, by its plan; "" if none are known


@dataclass
class MemoryRecord:
    """What a run knows of its memory.

    holds    name of a part -> what it consists of, asked for when memory is exhausted
    advice   the planner's flags for a command that needs more than there is
    """

    holds: dict[str, Callable[[], object]] = field(default_factory=dict)
    advice: Advice | None = None


def out_of_memory(
    error: Exception, config: Config, phase: str, kept: bool, record: MemoryRecord | None = None
) -> OutOfMemory | None:
    """Return the error for memory that is exhausted; None for any other error, and for one that says so already.

    kept: whether there is something to resume from
    """
    asked = None if isinstance(error, Gemma2Error) else memory_asked(error)
    if asked is None:
        return None
    record = record or MemoryRecord()
    on_host = "cpu" in str(error).lower() or type(error) is MemoryError
    doing = activity(error)
    what = f"{phase}{', ' if phase and doing else ''}{doing}: memory is exhausted, {asked}"
    held = _shown(record.holds, on_host, in_use(error))
    fitting = record.advice(config) if record.advice else ""
    smaller = fitting or " or ".join(smaller_flags(config, on_host))
    go_on, start_over = ("continue with --resume", "start over with --force ") if kept else ("start again", "give ")
    hint = f", or {start_over}{smaller}" if smaller else ""
    seen = "" if fitting else "; --dry-run shows what a run needs"
    return OutOfMemory(f"{what}{held}", f"free some and {go_on}{hint}{seen}")


def _shown(holds: Holds, on_host: bool, total: float | None) -> str:
    """What was resident, in words: parts, and the rest where the total is known."""
    parts: dict[str, float] = dict(resident(holds, on_host))
    rest = 0.0 if total is None else total - sum(parts.values())
    if rest > 0:
        parts["activations and other"] = rest
    if not parts:
        return ""
    return f"; in memory were {', '.join(f'{name} {size(count)}' for name, count in parts.items())}"


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
        if isinstance(value, int) and value > 8 and option not in config.without_effect():
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
