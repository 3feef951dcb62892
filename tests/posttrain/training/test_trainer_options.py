"""The options of TRL as they are read from its source are those of its classes."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import trl
from transformers import TrainingArguments

from gemma2.core.errors import UsageError
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.training.trainer_options import (
    DISTILL,
    EVERYWHERE,
    OPTIONS,
    REWARD,
    RL,
    SFT,
    check_trainer_options,
)

TABLES = [SFT, REWARD, DISTILL, RL]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_options_in_the_source_are_those_of_the_class(table):
    taken = {item.name for item in fields(getattr(trl, table.name)) if item.init}
    assert table.known() == taken
    assert table.unused <= taken
    assert EVERYWHERE | table.ours <= taken


def test_of_rl_every_option_that_trl_adds_is_without_effect():
    added = {item.name for item in fields(trl.RLOOConfig)} - {item.name for item in fields(TrainingArguments)}
    assert RL.without_effect() == RL.unused | {name for name in added if name in RL.known()}


@pytest.mark.parametrize("schema", OPTIONS, ids=lambda schema: schema.__name__)
def test_a_wrong_name_is_refused_for_every_command(schema):
    config = schema.model_construct(trainer={"optm": "sgd"})
    with pytest.raises(UsageError, match=r"trainer\.optm'; did you mean 'optim'"):
        check_trainer_options(config)
    check_trainer_options(schema.model_construct(trainer={"optim": "sgd", "adam_beta1": 0.5}))
    with pytest.raises(UsageError, match="gradient_checkpointing"):
        check_trainer_options(schema.model_construct(trainer={"gradient_checkpointing": True}))
    for name in OPTIONS[schema].ours - OPTIONS[schema].without_effect():
        with pytest.raises(UsageError, match=f"'trainer.{name}' is set by an option"):
            check_trainer_options(schema.model_construct(trainer={name: 1}))


class Stop(Exception):
    """Ends a command at the call that is looked at."""


@pytest.fixture
def named(monkeypatch):
    """The options that `trainer_arguments` sets when a command calls it with its own."""
    from gemma2.posttrain.distillation import distill
    from gemma2.posttrain.preferences import reward_trainer
    from gemma2.posttrain.rl import rlhf
    from gemma2.posttrain.sft import sft_trainer
    from gemma2.posttrain.training import trainer

    seen = {}

    def watched(given, known, unused, ours):
        seen.update(unused=set(unused), ours=set(ours))
        raise Stop

    monkeypatch.setattr(trainer, "refuse_options", watched)
    for module in (sft_trainer, reward_trainer):
        monkeypatch.setattr(module, "check_targets", lambda config, model: None)
    run = SimpleNamespace(checkpoints="c")

    def of(table):
        with pytest.raises(Stop):
            if table is SFT:
                sft_trainer.make_trainer(None, None, [], SftConfig(model="m", data="d"), run, 1)
            elif table is REWARD:
                reward_trainer.make_trainer(None, None, [], RewardConfig(model="m", data="d"), run)
            elif table is DISTILL:
                distill.distillation_arguments(DistillConfig(model="m", teacher="t", prompts="p"), run, 4)
            else:
                rlhf.rloo_arguments(RlhfConfig(policy="p", prompts="d", reward_fn="m:f"), run, 4, 4)
        return seen

    return of


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_command_sets_what_the_table_says(table, named):
    """Both refuse the same names: the command, when TRL is loaded, and the table, before."""
    assert named(table) == {"unused": set(table.without_effect()), "ours": set(EVERYWHERE | table.ours)}
