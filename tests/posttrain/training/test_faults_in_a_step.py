"""A fault in one step of a training: one line, the checkpoint before it, and a resume to the bytes of a quiet run.

`tests/torture/test_guards.py` does the same to every training command.
"""

import math

import pytest
import torch
from guard_faults import at_step, disk_full, loss_becomes, raising, spoil
from lines import STEPS, fit, metrics_of, opened

from gemma2.core.errors import Gemma2Error, GuardStop, OutOfMemory, OutputError, refusal
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.training.checkpoints import is_complete

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23 GiB")
FAULTS = {
    "NaN in the loss": (lambda step: loss_becomes(math.nan, step), GuardStop),
    "NaN in the figure of the loss": (lambda step: loss_becomes(math.nan, step, figure_alone=True), GuardStop),
    "an infinite gradient": (lambda step: at_step(step, "on_pre_optimizer_step", spoil(math.inf, True)), GuardStop),
    "NaN in the weights": (lambda step: at_step(step, "on_step_end", spoil(math.nan)), GuardStop),
    "an infinite weight": (lambda step: at_step(step, "on_step_end", spoil(-math.inf)), GuardStop),
    "no memory": (lambda step: at_step(step, "on_step_begin", raising(OOM)), OutOfMemory),
    "no room": (lambda step: disk_full(step, "room"), OutputError),
    "a full disk in a checkpoint": (lambda step: disk_full(step, "files"), OSError),
    "a full disk at its mark": (lambda step: disk_full(step, "mark"), OSError),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights and metrics of a run that nothing disturbs."""
    with opened(tmp_path_factory.mktemp("whole"), save_every=1) as (config, run):
        return fit(config, run), metrics_of(run)


@pytest.mark.parametrize("step", [1, 3, STEPS])
@pytest.mark.parametrize("name", FAULTS)
def test_the_checkpoint_before_the_fault_stays_and_leads_to_the_same_bytes(tmp_path, whole, name, step):
    fault, expected = FAULTS[name]
    with pytest.raises(expected) as caught, fault(step), opened(tmp_path, save_every=1) as (config, run):
        fit(config, run)
    line = str(caught.value) if isinstance(caught.value, Gemma2Error) else refusal(caught.value)
    assert line and "\n" not in line
    kept = [path for path in partial_path(tmp_path / "out").glob("checkpoints/*") if is_complete(path)]
    assert max((int(path.name.rpartition("-")[2]) for path in kept), default=0) == step - 1, line
    with opened(tmp_path, resume=partial_path(tmp_path / "out").exists(), save_every=1) as (config, run):
        assert torch.equal(fit(config, run), whole[0])
        assert metrics_of(run) == whole[1]


def test_weights_that_are_never_saved_are_not_in_a_result(tmp_path):
    """At the last step, where no checkpoint is due, as well."""
    fault = at_step(STEPS, "on_step_end", spoil(math.nan))
    stopped = pytest.raises(GuardStop, match=f"step {STEPS} .*nothing was saved")
    with stopped, fault, opened(tmp_path, save_every=100) as (config, run):
        fit(config, run)
