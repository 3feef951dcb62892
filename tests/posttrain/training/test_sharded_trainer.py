"""The private hooks of transformers and TRL on which checkpoints of sharded models depend.

A failure here after an upgrade says which one moved. What they do together is in tests/posttrain/sharding.
"""

import inspect

import pytest
from torch import nn
from transformers import Trainer
from trl import DistillationTrainer
from trl.models.utils import _ForwardRedirection

from gemma2.posttrain.training.sharded_trainer import RootRedirection, ShardedTrainer


@pytest.mark.parametrize(
    "name",
    [
        "_save_checkpoint",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_defer_fsdp_gradient_reduction",
        "save_model",
    ],
)
def test_a_hook_exists_with_our_parameters(name):
    theirs, ours = (inspect.signature(getattr(owner, name)).parameters for owner in (Trainer, ShardedTrainer))
    assert list(theirs) == list(ours)


def test_the_trainer_asks_whether_a_model_has_placed_itself():
    source = inspect.getsource(Trainer)
    for name in ("is_distributed_loading_by_transformers", "is_fsdp_managed_module", "save_only_model"):
        assert name in source
    assert "_forward_redirection" in inspect.getsource(DistillationTrainer.compute_loss)


def test_a_method_runs_inside_the_forward_pass_of_the_root_and_of_no_wrapper():
    class Root(nn.Module):
        def forward(self) -> str:
            return "its own"

    root, wrapper, seen = Root(), Root(), []
    root.register_forward_pre_hook(lambda module, inputs: seen.append("root"))
    wrapper.register_forward_pre_hook(lambda module, inputs: seen.append("wrapper"))
    assert RootRedirection(root)(wrapper, wrapper, lambda word: word, "done") == "done"
    assert seen == ["root"]
    assert root() == "its own"
    assert issubclass(RootRedirection, _ForwardRedirection)
