"""Memory that is exhausted: one line, with what was asked and flags that the command takes and that take less."""

import shlex
from pathlib import Path

import numpy
import pytest
import torch

from gemma2.core.errors import InputError, OutOfMemory, memory_asked, refusal
from gemma2.posttrain.runs.memory_shortage import out_of_memory, smaller_flags
from gemma2.posttrain.runs.run_directory import RunOptions, open_run
from gemma2.posttrain.schemas import DistillConfig, GenerateConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config, resolve

TOO_MUCH = 1 << 55  # bytes
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 GiB is free"
MPS = "MPS backend out of memory (MPS allocated: 9 GB, max allowed: 18 GB). Tried to allocate 2.00 GB on private pool."


def of_torch():
    torch.empty(TOO_MUCH, dtype=torch.int8)


def of_numpy():
    numpy.zeros(TOO_MUCH, dtype="i1")


def of_python():
    bytearray(TOO_MUCH)


def of(error):
    def fail():
        raise error

    return fail


CASES = {
    "torch": (of_torch, f"{TOO_MUCH} bytes more"),
    "numpy": (of_numpy, "32.0 PiB more"),
    "Python": (of_python, "not known"),
    "CUDA": (of(torch.OutOfMemoryError(CUDA)), "2.00 GiB more"),
    "MPS": (of(RuntimeError(MPS)), "2.00 GB more"),
    "the kernel": (of(OSError(12, "Cannot allocate memory")), "not known"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_library_s_way_to_say_it_is_known(case):
    fail, said = CASES[case]
    with pytest.raises(Exception) as caught:
        fail()
    assert said in memory_asked(caught.value)
    line = refusal(caught.value)
    assert line.startswith("memory is exhausted") and "\n" not in line and said in line
    wrapped = ValueError("while loading")
    wrapped.__cause__ = caught.value
    assert memory_asked(wrapped) == memory_asked(caught.value)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), OSError(2, "gone")])
def test_other_errors_are_not_taken_for_it(error):
    assert memory_asked(error) is None
    assert out_of_memory(error, None, "x", True) is None


def test_an_error_that_has_its_line_keeps_it():
    error = InputError("the function failed with MemoryError")
    error.__cause__ = MemoryError()
    assert out_of_memory(error, None, "x", True) is None


GIVEN = {
    SftConfig: {"model": "m", "data": "d"},
    RewardConfig: {"model": "m", "data": "d"},
    DistillConfig: {"model": "m", "teacher": "t", "prompts": "p"},
    RlhfConfig: {"policy": "m", "reward": ("r",), "prompts": "p", "prompts_per_step": 3, "n": 5},
    GenerateConfig: {"teacher": "t", "prompts": "p"},
}


@pytest.mark.parametrize("schema", GIVEN)
@pytest.mark.parametrize("on_host", [True, False])
def test_the_flags_are_those_of_the_command_and_their_values_are_taken(schema, on_host):
    config = schema.model_validate(GIVEN[schema])
    flags = smaller_flags(config, on_host)
    assert flags
    for flag in flags:
        name, value = shlex.split(flag)
        key = name.removeprefix("--").replace("-", "_")
        changed = resolve(schema, flags={**GIVEN[schema], key: value})
        assert getattr(changed, key) != getattr(config, key)
        later = smaller_flags(changed, on_host)
        assert flag not in later
    if schema is RlhfConfig:
        assert ("--anchor-memory cpu" in flags) == (not on_host)
        assert "--micro-batch-size 5" in flags


class Settings(Config):
    data: Path
    batch_size: int = 8


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_says_its_phase_and_keeps_its_checkpoint(tmp_path, kept):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    options = RunOptions(tmp_path / "out")
    short = pytest.raises(OutOfMemory)
    with short as caught, open_run("sft", Settings(data=tmp_path / "rows.jsonl"), options) as run:
        (run.checkpoints / "checkpoint-2").mkdir(parents=True) if kept else None
        run.phase = "step 3 of X"
        of_torch()
    how = "continue with --resume, or start over with --force " if kept else "start again, or give "
    assert f"step 3 of X: memory is exhausted, {TOO_MUCH} bytes more were asked for; " in str(caught.value)
    assert f"free some and {how}--batch-size 4; --dry-run shows" in str(caught.value)
    assert (tmp_path / ".out.partial" / "checkpoints" / "checkpoint-2").is_dir() == kept
    assert caught.value.exit_code == 1
