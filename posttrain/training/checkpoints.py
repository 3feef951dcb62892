"""Checkpoints of a training run: the mark of a whole one, the newest that can be resumed from, the room for the next.

Checkpoints of transformers have no mark of completeness, so a half-written one would be resumed from; here every
checkpoint gets a `complete.json` with the digest of each file, written last and verified before a resume.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from gemma2.core.errors import OutputError
from gemma2.core.json_files import read_json, write_json
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.ranks import ALONE, Ranks
from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.models.protocols import Network
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.sharding.distributed_state import own_files

__all__ = ["check_room", "checkpoint_bytes", "is_complete", "latest_checkpoint", "mark_complete", "newest_step"]

COMPLETE = "complete.json"


def mark_complete(checkpoint: Path, ranks: Ranks = ALONE) -> None:
    """Record the digest of every file of a checkpoint; a checkpoint without this mark is not resumed from.

    Every process of a sharded run digests its own part of the state, rank 0 the rest.
    """
    own = {_relative(path, checkpoint): digest_file(path) for path in own_files(checkpoint)}
    found = {name: digest for files in ranks.gather(own) for name, digest in files.items()}

    def mark() -> None:
        others = [path for path in files_of(checkpoint) if _relative(path, checkpoint) not in found]
        digests = found | {_relative(path, checkpoint): digest_file(path) for path in others}
        write_json(checkpoint / COMPLETE, {"files": dict(sorted(digests.items()))})

    ranks.on_main(mark)


def files_of(checkpoint: Path) -> list[Path]:
    """Return every file below a checkpoint."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _relative(path: Path, checkpoint: Path) -> str:
    return path.relative_to(checkpoint).as_posix()


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its mark and every file has the recorded digest."""
    try:
        files = read_json(checkpoint / COMPLETE).get("files")
        if not isinstance(files, dict) or not files:
            return False
        return all(digest_file(checkpoint / name) == digest for name, digest in files.items())
    except (OSError, ValueError):
        return False


def checkpoint_bytes(directory: str, model: Network, optimizer: object) -> int:
    """The size of the next checkpoint: that of one before it, else of the trained weights and the optimizer's state."""
    for path in Path(directory).glob(f"checkpoint-*/{COMPLETE}"):
        return sum(file.stat().st_size for file in files_of(path.parent))
    states = getattr(optimizer, "state", None) or {}
    held = [value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*held, *trained))


def check_room(directory: Path, needed: int, step: int) -> None:
    """Raise OutputError, before anything is written, for a checkpoint that the disk has no room for."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed > free:
        texts = sizes_apart(needed, free)
        raise OutputError(
            f"step {step}: its checkpoint needs {texts[0]}, {directory} has {texts[1]} free",
            "free some space, then " + ("continue with --resume" if any(directory.iterdir()) else "start again"),
        )


def latest_checkpoint(run: Run) -> tuple[Path, int] | None:
    """Return the newest complete checkpoint and its step; newer, incomplete ones are removed."""
    found = sorted(run.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        if is_complete(path):
            return path, int(path.name.rpartition("-")[2])
        shutil.rmtree(path)
    return None


def newest_step(run: Run) -> int:
    """The step of the newest checkpoint on the disk, 0 without any: where a training begins."""
    return max((int(path.name.rpartition("-")[2]) for path in run.checkpoints.glob("checkpoint-*")), default=0)
