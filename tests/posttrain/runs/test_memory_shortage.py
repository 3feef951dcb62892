"""Memory that is exhausted: one line, with what was asked and flags that the command takes and that take less."""

import shlex
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch

from gemma2.core.errors import InputError, OutOfMemory, memory_asked, refusal
from gemma2.posttrain.runs.memory_shortage import MemoryRecord, out_of_memory, smaller_flags
from gemma2.posttrain.runs.resident import activity, resident
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


class Block:
    """A storage of an accelerator."""

    def __init__(self, place, size):
        self.data_ptr, self.nbytes = lambda: place, lambda: size


class OnDevice:
    """A tensor as far as counting goes."""

    def __init__(self, place, size, device="cuda:0"):
        self.device, block = device, Block(place, size)
        self.untyped_storage = lambda: block


def test_each_storage_counts_once_for_the_first_part_and_the_rest_is_what_cuda_counts_besides():
    weights = [OnDevice(1, 20 * 2**30), OnDevice(2, 10 * 2**30)]
    holds = {
        "weights": lambda: weights,
        "gradients": lambda: [None, None],
        "anchor": lambda: {"a": OnDevice(1, 20 * 2**30), "b": OnDevice(3, 5 * 2**30), "c": OnDevice(4, 99, "cpu")},
        "reward models": lambda: partial(lambda one: one, OnDevice(5, 2**30)),
    }
    assert resident(holds, on_host=False) == {
        "weights": 30 * 2**30,
        "anchor": 5 * 2**30,
        "reward models": 2**30,
    }
    assert resident(holds, on_host=True) == {"anchor": 99}
    message = "Of the allocated memory 70.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch"
    error = torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB. {message}")
    line = str(out_of_memory(error, SftConfig.model_validate(GIVEN[SftConfig]), "step 3", True, MemoryRecord(holds)))
    assert (
        "in memory were weights 32.2 GB, anchor 5.37 GB, reward models 1.07 GB, activations and other 36.5 GB;" in line
    )


def test_models_are_found_in_closures_objects_and_modules():
    network = torch.nn.Linear(4, 8)  # 32 + 8 weights of four bytes
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(4)).sum().backward()
    optimizer.step()

    def closure():
        return network

    assert resident({"reward models": lambda: closure}, True) == {"reward models": 160}
    assert resident({"weights": lambda: network, "again": lambda: [network]}, True) == {"weights": 160}
    assert resident({"optimizer": lambda: optimizer}, True) == {"optimizer": 2 * 160 + 2 * 4}
    assert resident({"names": lambda: {str(i): network for i in range(20_000)}}, True) == {}  # a vocabulary


def test_the_innermost_known_function_names_the_activity():
    def backward():
        raise torch.OutOfMemoryError(CUDA)

    def compute_loss():
        backward()

    with pytest.raises(torch.OutOfMemoryError) as caught:
        compute_loss()
    assert activity(caught.value) == "loss"
    with pytest.raises(RuntimeError) as caught:
        of_torch()
    assert activity(caught.value) == ""


def test_flags_of_the_plan_replace_the_usual_ones():
    record = MemoryRecord(advice=lambda config: "--micro-batch-size 2 (3 GB by the plan, not 5 GB)")
    config = SftConfig.model_validate(GIVEN[SftConfig])
    line = str(out_of_memory(torch.OutOfMemoryError(CUDA), config, "step 3", True, record))
    assert line.endswith("start over with --force --micro-batch-size 2 (3 GB by the plan, not 5 GB)")
    assert "in memory were" not in line


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
