"""The state of a sharded run in a checkpoint: policy, optimizer and anchor, each process its part.

torch.distributed.checkpoint writes one file per process and reads them back on any number of processes: bit for bit the
same weights and moments. Its format holds for one version of torch, so it is never an output.

    checkpoint-N/state/    __0_0.distcp, __1_0.distcp, ..., .metadata
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from gemma2.core.errors import InputError, OutputError, refusal

__all__ = ["STATE_FOLDER", "load_state", "own_files", "save_state"]

STATE_FOLDER = "state"
TRAINED = StateDictOptions(ignore_frozen_params=True)


def save_state(
    checkpoint: Path, model: nn.Module, optimizer: Optimizer, further: Mapping[str, Mapping[str, Tensor]] | None = None
) -> None:
    """Write trained weights, optimizer state and further tensors by name. A collective.

    model: the sharded one, outside peft's wrapper. further: groups of tensors, divided or the same on every process.
    Raises OutputError on every process where the system refuses a write of any.
    """
    state: dict[str, object] = {
        "model": get_model_state_dict(model, options=TRAINED),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED),
        **{name: dict(tensors) for name, tensors in (further or {}).items()},
    }
    try:
        dcp.save(state, checkpoint_id=checkpoint / STATE_FOLDER)  # type: ignore[attr-defined]  # not in its __all__
    except dcp.api.CheckpointException as error:  # no Exception; it has the errors of all processes
        line = next(filter(None, (refusal(one) for one, _ in error.failures.values())), None)
        if line is None:
            raise RuntimeError(f"torch could not write the state of {checkpoint}") from error
        what, _, hint = line.partition("; ")
        raise OutputError(f"{what} (the state of {checkpoint})", hint) from error


def load_state(
    checkpoint: Path, model: nn.Module, optimizer: Optimizer, further: Mapping[str, Mapping[str, Tensor]] | None = None
) -> None:
    """Restore what `save_state` wrote, in place, on any number of processes. A collective.

    Raises InputError for a checkpoint without a state, or whose tensors are not those of the model.
    """
    folder = checkpoint / STATE_FOLDER
    if not (folder / ".metadata").is_file():
        raise InputError(
            f"the checkpoint {checkpoint} holds no state of a sharded run", "resume with the --strategy it began with"
        )
    weights = get_model_state_dict(model, options=TRAINED)
    moments = get_optimizer_state_dict(model, optimizer, options=TRAINED)
    state: dict[str, object] = {"model": weights, "optimizer": moments}
    state |= {name: dict(tensors) for name, tensors in (further or {}).items()}
    try:
        dcp.load(state, checkpoint_id=folder)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError, dcp.api.CheckpointException) as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(
            f"the state of {checkpoint} does not fit this run: {detail}", "resume with the model it began with"
        ) from error
    set_model_state_dict(model, weights, options=StateDictOptions(ignore_frozen_params=True, strict=False))
    set_optimizer_state_dict(model, optimizer, moments, options=TRAINED)


def own_files(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's state that this process wrote, to be digested here."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return sorted((checkpoint / STATE_FOLDER).glob(f"__{rank}_*.distcp"))
