"""The state of a sharded run that cannot be written is an error in one line, whichever process had it."""

import errno
import os

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from gemma2.core.errors import OutputError
from gemma2.posttrain.sharding.distributed_state import save_state


@pytest.mark.parametrize(
    ("failures", "kind", "said"),
    [
        (
            {1: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f")},
            OutputError,
            r"No space left .*state of .*free some",
        ),
        ({0: KeyError("k"), 2: OSError(errno.EROFS, os.strerror(errno.EROFS), "f")}, OutputError, "Read-only file"),
        ({0: KeyError("k")}, RuntimeError, "could not write the state"),
    ],
)
def test_a_write_that_fails_on_any_process_is_named(tmp_path, monkeypatch, failures, kind, said):
    def save(state, checkpoint_id):
        raise CheckpointException("write", {rank: (error, None) for rank, error in failures.items()})

    monkeypatch.setattr(dcp, "save", save)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(kind, match=said) as caught:
        save_state(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1))
    assert isinstance(caught.value, OutputError) == (kind is OutputError)
