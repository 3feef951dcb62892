"""Defaults that depend on LoRA: its learning rate and its alpha."""

import pytest

from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig, WarpConfig
from gemma2.posttrain.schemas.config import validated

COMMANDS = {
    RlhfConfig: {"policy": "p", "prompts": "p", "reward": "r"},
    WarpConfig: {"sft": "s", "prompts": "p", "heldout": "h", "reward": "r"},
    DistillConfig: {"model": "m", "teacher": "t", "prompts": "p"},
    SftConfig: {"model": "m", "data": "d"},
    RewardConfig: {"model": "m", "data": "d"},
}


@pytest.mark.parametrize(("kind", "values"), COMMANDS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_lora_learns_at_ten_times_the_rate_unless_a_rate_is_given(kind, values):
    full = kind.model_fields["learning_rate"].default
    assert validated(kind, values).learning_rate == full
    for rank in (8, "8"):
        assert validated(kind, values | {"lora_rank": rank}).learning_rate == pytest.approx(10 * full)
    for rank in (0, "0", None):
        off = {} if rank is None else {"lora_rank": rank}
        assert validated(kind, values | off).learning_rate == full
    given = validated(kind, values | {"lora_rank": 8, "learning_rate": full})
    assert given.learning_rate == full


@pytest.mark.parametrize(("kind", "values"), COMMANDS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_alpha_is_twice_the_rank_unless_it_is_given(kind, values):
    assert validated(kind, values | {"lora_rank": 8}).alpha == 16
    assert validated(kind, values | {"lora_rank": 64}).alpha == 128
    assert validated(kind, values | {"lora_rank": 64, "lora_alpha": 3}).alpha == 3
