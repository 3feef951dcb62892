"""A checkpoint file that holds code is one line, and the code does not run."""

import os

import pytest
import torch

from gemma2.core.errors import InputError
from gemma2.posttrain.training.trainer import readable_state


class Planted:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_a_pickled_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save(Planted(str(tmp_path / "canary")), tmp_path / "optimizer.pt")
    with (
        pytest.raises(InputError, match=r"checkpoint .* other things than tensors") as caught,
        readable_state(tmp_path),
    ):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()
