"""Names of other tools are answered with ours, for every command, and the answer can be typed as it stands."""

import re
import shlex
from dataclasses import fields

import pytest
from commands import all_commands
from typer.core import TyperGroup

from gemma2.cli.app import invoke
from gemma2.cli.terminal import options
from gemma2.core.errors import Gemma2Error, UsageError
from gemma2.posttrain.foreign.counterparts import RUN_FLAGS, hint_for
from gemma2.posttrain.foreign.names import COMMANDS_ELSEWHERE, NAMES
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.schemas.config import resolve

FLAGS = {
    name: {flag for part in command.params for flag in (*part.opts, *part.secondary_opts) if flag.startswith("-")}
    for name, command in all_commands()
    if not isinstance(command, TyperGroup) or command.invoke_without_command
}
SCHEMAS = {name: command.schema for name, command in COMMANDS.items()}


def known_of(name: str) -> set[str]:
    """The keys of a command, as its parser knows them."""
    keys = {flag.lstrip("-").replace("-", "_") for flag in FLAGS[name]}
    return keys | ({"trainer"} if "--report-to" in FLAGS[name] else set())


def test_the_table_is_large_and_every_counterpart_is_a_key_of_some_command():
    from trl import RewardConfig as TrlReward
    from trl import SFTConfig as TrlSft

    known = {key for schema in SCHEMAS.values() for key in schema.model_fields}
    known |= {key for name in FLAGS for key in known_of(name)} | set(RUN_FLAGS)
    known |= {f"trainer.{item.name}" for kind in (TrlSft, TrlReward) for item in fields(kind)}
    named = {ours for row in NAMES.values() for ours in row.ours}
    assert named - known == set()
    assert sum(bool(row.ours) for row in NAMES.values()) >= 60
    assert all(row.ours or row.instead for row in NAMES.values())


def test_no_name_of_the_table_is_ours_in_every_command_that_has_it():
    """A row is of use where a command lacks the name: some command does."""
    useless = [name for name in NAMES if all(name in schema.model_fields for schema in SCHEMAS.values())]
    assert useless == []


@pytest.mark.parametrize("command", FLAGS)
def test_an_answer_names_only_flags_of_its_command(command):
    """All rows of the table, with and without a value."""
    known = known_of(command)
    for name in NAMES.keys() - known:
        for value in (None, 1, "a,b", True, 0.5):
            hint = hint_for(name, known, value)
            assert hint, name
            if "gemma2 " in hint:
                continue  # a whole command line of another command
            typed = set(re.findall(r"--[a-z][a-z-]*", hint)) - {"--out", "--force", "--resume"}
            assert typed <= FLAGS[command] | {"--set"}, (name, value, hint)
            assert "trainer." not in hint or "trainer" in known, (name, hint)


def refused(words: list[str]) -> Gemma2Error:
    with pytest.raises(Gemma2Error) as error:
        invoke(words)
    return error.value


@pytest.fixture
def resolved(monkeypatch):
    """The configurations that command lines resolve to, instead of their runs."""
    found = []
    monkeypatch.setattr(options, "execute", lambda config, given, run, console: found.append((config, given)))
    return found


NEEDED = {
    "sft": ["sft", "--model", "m", "--data", "d", "--out", "o"],
    "reward": ["reward", "--model", "m", "--data", "d", "--out", "o"],
    "rlhf": ["rlhf", "--policy", "m", "--reward", "r", "--prompts", "p", "--out", "o"],
    "distill": ["distill", "--model", "m", "--teacher", "t", "--prompts", "p", "--out", "o"],
    "generate": ["generate", "--teacher", "m", "--prompts", "p", "--out", "o"],
    "warp": ["warp", "--sft", "m", "--reward", "r", "--prompts", "p", "--heldout", "h", "--out", "o"],
}
# Words of another tool -> our settings for them, by command.
TYPED = [
    ("sft", "--num_train_epochs 3", {"epochs": 3.0}),
    ("sft", "--num-train-epochs=3", {"epochs": 3.0}),
    ("sft", "--num_epochs 2", {"epochs": 2.0}),
    ("sft", "--cutoff_len 2048", {"max_length": 2048}),
    ("sft", "--max_seq_length 512", {"max_length": 512}),
    ("sft", "--sequence_len 4096", {"max_length": 4096}),
    ("sft", "--learning_rate 2e-4", {"learning_rate": 2e-4}),
    ("sft", "--lr 2e-4", {"learning_rate": 2e-4}),
    ("sft", "--lora_r 8", {"lora_rank": 8}),
    ("sft", "--lora_alpha 32", {"lora_alpha": 32.0}),
    ("sft", "--lora_target q_proj,v_proj", {"lora_targets": ("q_proj", "v_proj")}),
    ("sft", "--lora_target all", {"lora_targets": ()}),
    ("sft", "--target_modules q_proj", {"lora_targets": ("q_proj",)}),
    ("sft", "--per_device_train_batch_size 4", {"batch_size": 4}),
    ("sft", "--val_size 0.1", {"eval_fraction": 0.1}),
    ("sft", "--test_split_size 0.1", {"eval_fraction": 0.1}),
    ("sft", "--warmup_steps 10", {"warmup_steps": 10}),
    ("sft", "--lr_scheduler_type cosine", {"trainer": {"lr_scheduler_type": "cosine"}}),
    ("sft", "--lr_scheduler linear", {"trainer": {}}),
    ("sft", "--weight_decay 0.1", {"trainer": {"weight_decay": 0.1}}),
    ("sft", "--optim adamw_torch", {"trainer": {}}),
    ("sft", "--neftune_noise_alpha 5", {"trainer": {"neftune_noise_alpha": 5}}),
    ("sft", "--logging_steps 10", {"log_every": 10}),
    ("sft", "--save_steps 500", {"save_every": 500}),
    ("sft", "--eval_steps 50", {"eval_every": 50}),
    ("sft", "--early_stopping_patience 3", {"patience": 3}),
    ("sft", "--load_best_model_at_end true", {"keep": "best"}),
    ("sft", "--random_state 3407", {"seed": 3407}),
    ("sft", "--attn_implementation sdpa", {"attention": "sdpa"}),
    ("sft", "--sdp_attention true", {"attention": "sdpa"}),
    ("sft", "--flash_attn disabled", {"attention": "eager"}),
    ("sft", "--flash_attn auto", {"attention": "auto"}),
    ("sft", "--flash_attn fa2", {"attention": "flash_attention_2"}),
    ("sft", "--neat_packing true", {"packing": True}),
    ("sft", "--use_wandb true", {"report_to": ("wandb",)}),
    ("sft", "--report_to none", {"report_to": ()}),
    ("sft", "--max_grad_norm 0.5", {"max_grad_norm": 0.5}),
    ("sft", "--gradient_clipping 0.5", {"max_grad_norm": 0.5}),
    ("reward", "--center_rewards_coefficient 0.01", {"center_coefficient": 0.01}),
    ("reward", "--num_train_epochs 2", {"epochs": 2.0}),
    ("rlhf", "--num_generations 8", {"n": 8}),
    ("rlhf", "--rloo_k 2", {"n": 2}),
    ("rlhf", "--init_kl_coef 0.05", {"beta": 0.05}),
    ("rlhf", "--max_completion_length 64", {"max_new_tokens": 64}),
    ("rlhf", "--response_length 53", {"max_new_tokens": 53}),
    ("rlhf", "--max_steps 20", {"steps": 20}),
    ("rlhf", "--per_device_train_batch_size 32", {"prompts_per_step": 8, "n": 4}),
    ("rlhf", "--use_vllm true", {"engine": "vllm"}),
    ("rlhf", "--ref_model_mixup_alpha 0.99", {"mu": 0.01}),
    ("distill", "--lmbda 0.5", None),
    ("distill", "--per_device_train_batch_size 8", {"batch_size": 8}),
    ("generate", "--num_return_sequences 4", {"n": 4}),
    ("generate", "--max_samples 10", {"limit": 10}),
    ("generate", "--per_device_eval_batch_size 4", {"batch_size": 4}),
    ("sft", "--per_device_eval_batch_size 4", {"batch_size": 16}),
    ("warp", "--num_generations 8", {"n": 8}),
]


def followed(base: list[str], words: list[str], hint: str) -> list[str]:
    """The command line after the answer was followed to the letter."""
    write = re.search(r"write ((?:--?\S+(?: (?!instead)[^-\s]\S*)* ?)+)", hint)
    if write:
        return [*base, *shlex.split(write[1])]
    assert "leave it out" in hint, (words, hint)
    return base


@pytest.mark.parametrize(("command", "typed", "ours"), TYPED, ids=lambda value: str(value)[:50])
def test_an_answer_that_is_followed_to_the_letter_sets_what_was_meant(resolved, command, typed, ours):
    base, words = NEEDED[command], typed.split()
    if ours and ours.keys() & {"lora_alpha", "lora_targets"}:
        base = [*base, "--lora-rank", "8"]  # without it they are refused
    error = refused([*base, *words])
    assert error.exit_code == 2
    if ours is None:
        assert "--on-policy-fraction" in str(error)
        return
    assert invoke(followed(base, words, error.hint)) == 0
    ((config, _),) = resolved
    assert {key: getattr(config, key) for key in ours} == ours


def test_per_device_and_accumulation_are_one_batch(resolved):
    words = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8"]
    error = refused([*NEEDED["sft"], *words])
    assert "instead of per_device_train_batch_size and gradient_accumulation_steps" in error.hint
    assert invoke([*NEEDED["sft"], *followed([], words, error.hint)]) == 0
    ((config, _),) = resolved
    assert (config.batch_size, config.micro_batch_size) == (32, 4)


@pytest.mark.parametrize(
    ("words", "flag"),
    [("--model_name_or_path x", "--model x"), ("--base_model x", "--model x"), ("--output_dir x", "--out x")],
)
def test_names_of_inputs_and_outputs_are_answered(words, flag):
    assert f"write {flag}" in refused(["sft", *words.split()]).hint


def test_names_as_set_and_as_keys_of_a_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ndata: d\nnum_train_epochs: 3\ncutoff_len: 64\n")
    for _ in range(2):
        with pytest.raises(UsageError) as error:
            resolve(SftConfig, file=file)
        assert f"{file}:3:1" in str(error.value)
        theirs, written = re.search(r"unknown key '(\w+)'", str(error.value))[1], error.value.hint.split("write ")[1]
        file.write_text(re.sub(rf"{theirs}: \S+", written, file.read_text()))
        file.write_text("\n".join([*file.read_text().splitlines()[:2], *file.read_text().splitlines()[:1:-1]]) + "\n")
    assert resolve(SftConfig, file=file).max_length == 64
    with pytest.raises(UsageError, match="--set epochs=3"):
        resolve(SftConfig, sets=["model=m", "data=d", "num_train_epochs=3"])
    with pytest.raises(UsageError, match="command line: --out x"):
        resolve(SftConfig, sets=["model=m", "data=d", "output_dir=x"])


@pytest.mark.parametrize(
    ("value", "options", "packing"),
    [("true", ["--attention", "flash_attention_2"], True), ("False", [], False)],
)
def test_a_switch_with_a_value_is_answered(resolved, value, options, packing):
    error = refused([*NEEDED["sft"], *options, "--packing", value])
    assert "is a switch" in str(error)
    assert invoke([*NEEDED["sft"], *options, error.hint.removeprefix("write ")]) == 0
    assert resolved[0][0].packing is packing


@pytest.mark.parametrize("word", COMMANDS_ELSEWHERE)
def test_commands_of_other_tools_are_answered(word):
    error = refused([word])
    assert error.hint == COMMANDS_ELSEWHERE[word]
    names = re.findall(r"gemma2 ([a-z]+(?: linear| inspect)?)", error.hint)
    assert set(names) <= {name for name, _ in all_commands()}


def test_a_name_of_no_tool_gets_the_nearest_of_ours():
    assert "epochs" in str(refused(["sft", "--epoch", "3"]))
    assert hint_for("lerning_rate", SftConfig.model_fields) is None
