"""Whether flags, launcher and batch fit the number of processes. Torch-free.

processes = --gpus x --nodes, each with an equal share of the rows of a step
"""

from __future__ import annotations

from gemma2.core.errors import UsageError
from gemma2.core.ranks import announced, announced_here
from gemma2.posttrain.schemas import DistillConfig, LaunchFields, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config

__all__ = ["check_shares", "check_world", "divides"]


def check_world(config: LaunchFields) -> None:
    """Raise UsageError if the launcher that started this process has started another number than the flags ask for."""
    size = announced()
    here = announced_here()
    gpus = config.gpus if config.gpus is not None else here if config.nodes > 1 else None
    if gpus is not None and gpus * config.nodes != size:
        flags = " ".join([f"--gpus {gpus}"] * (config.gpus is not None) + [f"--nodes {config.nodes}"])
        raise UsageError(
            f"WORLD_SIZE is {size}, and {flags} is {gpus * config.nodes} processes",
            "drop these flags under torchrun, or start the command without torchrun: it starts its processes itself",
            "--gpus",
        )


def _rows_of_step(config: Config) -> tuple[str, int]:
    """The field with the rows of an optimizer step, and how many of them stay together."""
    if isinstance(config, RlhfConfig):
        return "prompts_per_step", 1
    if isinstance(config, DistillConfig):
        return "batch_size", config.n
    return "batch_size" if isinstance(config, SftConfig | RewardConfig) else "", 1


def divides(config: Config, processes: int) -> bool:
    """Whether each process gets the same number of rows of a step; so for a command without steps."""
    name, together = _rows_of_step(config)
    return not name or int(getattr(config, name)) % (processes * together) == 0


def check_shares(config: Config, processes: int) -> None:
    """Raise UsageError, with a number that works, if the rows of a step are not the same for each process."""
    if processes == 1 or divides(config, processes):
        return
    name, together = _rows_of_step(config)
    rows, unit = int(getattr(config, name)), processes * together
    flag = f"--{name.replace('_', '-')}"
    more = f"{flag} {-(-rows // unit) * unit}"
    fewer = f", or {flag} {rows // unit * unit}" if rows > unit else ""
    of_each = f" times --n {together}" if together > 1 else ""
    raise UsageError(
        f"{flag} {rows} is not a multiple of the {processes} processes{of_each}", f"give {more}{fewer}", flag
    )
