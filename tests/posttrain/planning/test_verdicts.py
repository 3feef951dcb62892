"""Verdicts agree with the sums; the flags that they advise, pasted, lead to a plan that fits."""

import json
import math
import shlex

import pytest

from gemma2.cli.app import invoke
from gemma2.posttrain.planning.memory import Lengths, MemoryPlace, memory_of
from gemma2.posttrain.planning.shapes import shape_of
from gemma2.posttrain.planning.verdicts import CARDS, GB, gpus_flags, judge, micro_batch_field, micro_batches
from gemma2.posttrain.schemas import (
    DistillConfig,
    EvalConfig,
    GenerateConfig,
    PairsConfig,
    RewardConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    WarpConfig,
)

CONFIGS = {
    "sft": SftConfig(model="2b", data="rows"),
    "sft, long": SftConfig(model="9b", data="rows", max_length=8192, lora_rank=8),
    "sft, 27B": SftConfig(model="27b", data="rows", lora_rank=16, micro_batch_size=4),
    "reward": RewardConfig(model="9b", data="rows", batch_size=12),
    "distill": DistillConfig(model="2b", teacher="9b", prompts="prompts", teacher_dtype="float32"),
    "rlhf": RlhfConfig(policy="2b", reward="2b", prompts="prompts"),
    "rlhf, LoRA": RlhfConfig(policy="9b", reward=("2b", "9b"), prompts="prompts", lora_rank=16),
    "warp": WarpConfig(sft="2b", reward="2b", prompts="prompts", heldout="prompts", jobs=2),
    "generate": GenerateConfig(teacher="27b", prompts="prompts", max_new_tokens=2048),
    "pairs": PairsConfig(model="9b", prompts="prompts", judge="m:f"),
    "score": RewardScoreConfig(model="2b", data="rows"),
    "eval": EvalConfig(model="9b", sft="9b", reward="2b", prompts="prompts"),
}
PLACES = [*(MemoryPlace("accelerator", capacity=size * GB) for size in CARDS), MemoryPlace("cpu", capacity=20 * 2**30)]


def needed(config, place, **changes):
    return memory_of(config.model_copy(update=changes), shape_of, place, Lengths()).peak.bytes


def changed(config, verdict):
    """The configuration with the advised flags, as a command line gives it."""
    flags = dict(zip(verdict.flags[::2], verdict.flags[1::2], strict=True))
    fields = {name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()}
    return type(config).model_validate(config.model_dump() | fields)


@pytest.mark.parametrize("name", CONFIGS)
def test_verdicts_agree_with_the_sums(name):
    config = CONFIGS[name]
    for place in PLACES:
        verdict = judge(config, shape_of, place)
        assert verdict.needed == needed(config, place)
        assert verdict.fits == (verdict.needed <= place.capacity)
        if verdict.fits:
            assert verdict.flags == ()
            field, sizes = micro_batch_field(config), micro_batches(config)
            larger = [size for size in sizes if size > verdict.micro_batch][:1]
            assert needed(config, place, **{field: verdict.micro_batch}) <= place.capacity
            assert all(needed(config, place, **{field: size}) > place.capacity for size in larger)
        elif verdict.flags:
            after = changed(config, verdict)
            assert needed(after, place) == verdict.needed_then <= place.capacity
            assert judge(after, shape_of, place).fits
        else:
            assert verdict.needed_then > place.capacity
            assert "no flags help" in verdict.advice or gpus_flags(verdict.gpus) in verdict.advice


def test_every_kind_of_verdict_is_among_them():
    found = [judge(config, shape_of, place) for config in CONFIGS.values() for place in PLACES]
    short = needed(CONFIGS["rlhf"], MemoryPlace("accelerator"), micro_batch_size=1) - 1
    found.append(judge(CONFIGS["rlhf"], shape_of, MemoryPlace("accelerator", capacity=short)))
    assert {(one.fits, bool(one.flags)) for one in found} == {(True, False), (False, True), (False, False)}
    flags = {flag for one in found for flag in one.flags[::2]}
    assert flags >= {"--micro-batch-size", "--batch-size", "--lora-rank"}


def test_the_change_that_touches_least_comes_first():
    rlhf = CONFIGS["rlhf"]
    whole = judge(rlhf, shape_of, MemoryPlace("accelerator"))
    step = judge(
        rlhf,
        shape_of,
        MemoryPlace("accelerator", capacity=needed(rlhf, MemoryPlace("accelerator"), micro_batch_size=8)),
    )
    assert whole.micro_batch == 64
    assert step.flags == ("--micro-batch-size", "8")  # no number changes but rounding
    least = needed(rlhf, MemoryPlace("accelerator"), micro_batch_size=1)
    beyond = judge(rlhf, shape_of, MemoryPlace("accelerator", capacity=least - 1))
    assert beyond.flags[:2] == ("--anchor-memory", "cpu")  # before LoRA, which trains other weights


def test_a_model_of_unknown_size_gets_no_verdict():
    from gemma2.posttrain.planning.shapes import shape_of_parameters

    assert judge(CONFIGS["sft"], lambda path: shape_of_parameters(math.nan), PLACES[0]) is None


LINES = {
    "plan sft --model 9b": "48GB",
    "plan sft --model 2b --set micro_batch_size=16": "40GB",
    "plan reward --model 2b": "24GB",
    "plan reward score 2b": "24GB",
    "plan distill --model 2b --teacher 9b --teacher-dtype float32": "80GB",
    "plan rlhf --policy 2b --reward 2b": "80GB",
    "plan warp --sft 2b --reward 2b --jobs 2": "80GB",
    "plan generate --teacher 9b": "24GB",
    "plan eval --model 2b --sft 2b --reward 2b": "16GB",
}


@pytest.mark.parametrize("line", LINES)
def test_pasted_flags_fit(line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*line.split(), "--gpu", LINES[line], "--json"]
    assert invoke(words) == 0
    [before] = json.loads(capsys.readouterr().out)["verdicts"]
    assert (before["fits"], bool(before["flags"])) == (False, True)
    assert invoke([*words, *shlex.split(before["flags"])]) == 0
    [after] = json.loads(capsys.readouterr().out)["verdicts"]
    assert after["fits"]
    assert after["needs_gib"] == before["then_gib"]


@pytest.mark.parametrize(
    ("line", "size", "flags"),
    [
        ("plan sft --model 9b", "80GB", "--gpus 4"),
        ("plan sft --model 27b --batch-size 32", "80GB", "--gpus 8"),
        ("plan rlhf --policy 2b --reward 2b --set micro_batch_size=4", "48GB", "--gpus 2"),
        ("plan rlhf --policy 27b --reward 9b --set micro_batch_size=1", "141GB", "--gpus 8"),
        ("plan reward --model 9b --batch-size 32 --set micro_batch_size=1", "24GB", "--gpus 8 --nodes 2"),
    ],
)
def test_the_fewest_gpus_hold_a_command_and_half_of_them_do_not(line, size, flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*line.split(), "--gpu", size, "--json"]
    assert invoke(words) == 0
    [before] = json.loads(capsys.readouterr().out)["verdicts"]
    count = before["fewest_gpus"]
    assert gpus_flags(count) == flags
    for gpus, fits in ((flags, True), (gpus_flags(count // 2), False)):
        assert invoke([*words, *gpus.split(), "--strategy", "fsdp"]) == 0
        [after] = json.loads(capsys.readouterr().out)["verdicts"]
        assert after["fits"] == fits, gpus


def test_micro_batches_are_of_the_share_of_a_process():
    assert micro_batches(CONFIGS["sft"].model_copy(update={"batch_size": 12}), 4) == [1, 3]
    rl = CONFIGS["rlhf"].model_copy(update={"prompts_per_step": 8, "n": 3})
    assert micro_batches(rl, 4) == [1, 2, 3, 6]
