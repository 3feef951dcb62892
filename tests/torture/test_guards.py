"""A fault in one step of a training: it ends in one line, the last good checkpoint stays, and a resume uses it.

Once the fault is gone, the resumed run ends with the bytes of one that nothing has disturbed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from chat_server import KEY, Server, reset, serving
from guard_faults import at_step, disk_full, loss_becomes, raising, spoil
from guard_runs import STEPS, answering, bytes_of, configured, good_checkpoint, judging, reward_is, run, write_inputs
from ledger import recorded, times

from gemma2.core.errors import Gemma2Error, GuardStop, InputError, OutOfMemory, refusal
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.generation.engines import server
from gemma2.posttrain.schemas.config import Config

pytestmark = pytest.mark.torture

Fault = Callable[[int], AbstractContextManager[None]]
COMMANDS = ("sft", "reward", "distill", "rlhf")
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23 GiB")

# Fault -> what it does to a step, what ends the run (a type, or OSError: a line of `refusal`).
EVERY: dict[str, tuple[Fault, type[Exception]]] = {
    "NaN in the loss": (lambda step: loss_becomes(math.nan, step), GuardStop),
    "an infinite loss": (lambda step: loss_becomes(math.inf, step), GuardStop),
    "NaN in the figure of the loss": (lambda step: loss_becomes(math.nan, step, figure_alone=True), GuardStop),
    "NaN in a gradient": (lambda step: at_step(step, "on_pre_optimizer_step", spoil(math.nan, True)), GuardStop),
    "an infinite gradient": (lambda step: at_step(step, "on_pre_optimizer_step", spoil(-math.inf, True)), GuardStop),
    "NaN in the weights": (lambda step: at_step(step, "on_step_end", spoil(math.nan)), GuardStop),
    "an infinite weight": (lambda step: at_step(step, "on_step_end", spoil(math.inf)), GuardStop),
    "no memory on a GPU": (lambda step: at_step(step, "on_step_begin", raising(OOM)), OutOfMemory),
    "no memory": (lambda step: at_step(step, "on_pre_optimizer_step", raising(MemoryError())), OutOfMemory),
    "no room for a checkpoint": (lambda step: disk_full(step, "room"), Gemma2Error),
    "a full disk in a checkpoint": (lambda step: disk_full(step, "files"), OSError),
    "a full disk at its mark": (lambda step: disk_full(step, "mark"), OSError),
}
# Of the reward function. With an evaluation at every step: a call for the one before the first step, then two for each
# step, its completions and the evaluation after it.
OF_A_REWARD: dict[str, type[Exception]] = {
    "nan": InputError,
    "raise": InputError,
    "exit": InputError,
    "memory": InputError,
    "hang": GuardStop,
    "constant": GuardStop,
}
OFTEN = {"eval_every": 1}
LIMIT = {"reward_timeout": 0.3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("guards"))


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Callable[[str, Config], dict[str, bytes]]:
    """The bytes of an undisturbed run of a configuration."""
    known: dict[str, dict[str, bytes]] = {}

    def made(command: str, config: Config) -> dict[str, bytes]:
        key = f"{command} {config!r}"
        if key not in known:
            known[key] = bytes_of(run(command, config, inputs / f"whole-{len(known)}"))
            assert known[key]
        return known[key]

    return made


def disturbed(whole, command, config, out, fault, expected, first=None) -> None:
    """Run into a fault of step `first + 1`, look at what is left, resume without the fault, compare."""
    wanted = whole(command, config)
    with pytest.raises(Exception) as caught, fault:
        run(command, config, out)
    error = caught.value
    line = str(error) if isinstance(error, Gemma2Error) else refusal(error)
    assert isinstance(error, expected), repr(error)
    assert line and "\n" not in line, repr(error)
    assert not out.exists()
    kept = good_checkpoint(out)
    assert kept == (first or 0), f"{line}: a resume would go on from {kept}"
    run(command, config, out, resume=partial_path(out).exists())
    assert bytes_of(out) == wanted, line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_in_a_step_leaves_the_checkpoint_before_it(inputs, whole, command, tmp_path):
    config = configured(inputs, command)
    with recorded(f"a fault in a step of {command}: stopped in one line, resumed to the same bytes") as figures:
        for trial in range(times(2)):
            for name, (fault, expected) in EVERY.items():
                step = random.randint(1, STEPS)  # told where it fails, by the checkpoint
                disturbed(whole, command, config, tmp_path / f"{name} {trial}", fault(step), expected, step - 1)
                figures[name] = figures.get(name, 0) + 1


def test_a_fault_of_the_reward_leaves_the_checkpoint_before_it(inputs, whole, tmp_path):
    with recorded("a fault of a reward function in rlhf: stopped in one line, resumed to the same bytes") as figures:
        for trial in range(times(3)):
            for kind, expected in OF_A_REWARD.items():
                step = random.randint(1, STEPS)
                call = 2 * step if trial % 2 == 0 or kind == "constant" else 2 * step + 1
                config = configured(inputs, "rlhf", **OFTEN, **(LIMIT if kind == "hang" else {}))
                disturbed(
                    whole, "rlhf", config, tmp_path / f"{kind} {trial}", reward_is(kind, call), expected, step - 1
                )
                figures[kind] = figures.get(kind, 0) + 1


def test_a_policy_that_leaves_the_sft_policy_stops_before_it_is_saved(inputs, whole, tmp_path):
    def leap(_, model):
        with torch.no_grad():
            model.model.norm.weight.add_(50.0)

    config = configured(inputs, "rlhf", **OFTEN, max_kl=50.0)
    with recorded("a KL that explodes in a step of rlhf: stopped, resumed to the same bytes") as figures:
        for step in range(1, STEPS + 1):
            fault = at_step(step, "on_step_end", leap)
            disturbed(whole, "rlhf", config, tmp_path / f"{step}", fault, GuardStop, step - 1)
            figures["runs"] = figures.get("runs", 0) + 1


# --- answers and judgements -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["reward pairs", "generate"])
def test_a_function_that_hangs_or_fails_loses_no_answer(inputs, whole, tmp_path, command):
    config = (judging if command == "reward pairs" else answering)(inputs, **LIMIT)
    with recorded(f"a fault of the function in {command}: stopped in one line, resumed to the same bytes") as figures:
        for kind, expected in OF_A_REWARD.items():
            if kind != "constant":
                disturbed(whole, command, config, tmp_path / kind, reward_is(kind, 1), expected)
                figures[kind] = figures.get(kind, 0) + 1


class JudgingServer(Server):
    """Scores an answer by its length; dead from its request number `dies` on."""

    dies = 10**9

    def __init__(self):
        super().__init__(faults=lambda number, body: reset if number >= self.dies else None)

    def completion(self, body):
        found = super().completion(body)
        found["choices"][0]["message"]["content"] = f"Score: {1 + len(body['messages'][0]['content']) % 9}"
        return found


def test_a_judge_s_server_that_dies_is_asked_for_nothing_twice(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(server.asyncio, "sleep", no_sleep)
    judge = JudgingServer()
    told = "a judge's server dies during reward pairs: stopped, resumed to the same bytes"
    with recorded(told) as figures, serving(judge) as url:
        config = judging(inputs, judge="openai:a/judge", judge_url=url, judge_concurrency=1)
        undisturbed = bytes_of(run("reward pairs", config, tmp_path / "whole"))
        asked = len(judge.requests)
        for alive in random.sample(range(asked), times(8)):
            judge.requests.clear()
            judge.answered.clear()
            judge.dies = alive
            out = tmp_path / f"{alive}"
            with pytest.raises(InputError) as caught:
                run("reward pairs", config, out)
            assert "\n" not in str(caught.value)
            judge.dies = 10**9
            run("reward pairs", config, out, resume=True)
            assert bytes_of(out) == undisturbed
            assert len(judge.answered) == asked, "no reply is paid for twice"
            figures["runs"] = figures.get("runs", 0) + 1


async def no_sleep(seconds):
    return None
