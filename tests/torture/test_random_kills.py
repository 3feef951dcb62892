"""Random SIGKILL, SIGTERM and SIGINT of every command that can be continued; then the same command, and its bytes."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter

import planted
import pytest
from ledger import recorded, times
from strikes import Trial
from world import World, files_of
from zygote import zygote

from gemma2.core.outputs.promised import fault_of

pytestmark = pytest.mark.torture

KILLS = {
    **{"sft": 45, "distill": 45, "reward": 40, "rlhf": 45, "rlhf lora": 30, "generate": 30, "filter": 15},
    **{"warp": 10, "pipeline": 20},
}
REPLACED = {"sft": 10, "generate": 10}  # kills of a replacement
SIGNALS = {
    **{"sft": 18, "distill": 16, "reward": 12, "rlhf": 16, "rlhf lora": 10, "generate": 12, "filter": 6},
    **{"warp": 3, "pipeline": 7},
}
PLANTED = planted.call("forked_stages")
SECONDS: dict[str, float] = {}  # that each takes


@pytest.fixture(scope="module")
def parent():
    with zygote() as started:
        yield started


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("kills"))


def moment_of(parent, world, name, moments, share=1.0):
    """A random moment in the first share of the time that a command takes when nothing disturbs it."""
    if name not in SECONDS:
        world.expected(parent, name, before=PLANTED)
        SECONDS[name] = Trial(parent, world, name).seconds()
    return moments.uniform(0, share * SECONDS[name])


def disturbed(parent, world, name, number, how, moments):
    """One disturbance of a command, and its repair: what the trial counted."""
    expected = world.expected(parent, name, before=PLANTED)
    moment = moment_of(parent, world, name, moments)
    trial = Trial(parent, world, name)
    code, err = trial.strike(number, moment, how=how)
    state = trial.judge(number, code, err, how)
    counts = Counter({"ended before it": code == 0, f"{state} then": 1})
    counts["further starts"] += trial.go_on(moments.random() < 0.5)
    trial.check(expected)
    return counts


def test_after_kill_9_the_same_command_ends_with_the_same_bytes(parent, world):
    moments, total = random.Random(), Counter()
    with recorded("kill -9 of training, generate, filter, warp, pipelines") as figures:
        for name, count in KILLS.items():
            for turn in range(times(count)):
                how = "all" if name in ("warp", "pipeline") and turn % 2 else ""
                total += disturbed(parent, world, name, signal.SIGKILL, how, moments)
                figures["kills"] = figures.get("kills", 0) + 1
        figures |= dict(total)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_after_a_signal_the_same_command_ends_with_the_same_bytes(parent, world, number):
    moments, total = random.Random(), Counter()
    with recorded(f"{signal.Signals(number).name} of the same commands") as figures:
        for name, count in SIGNALS.items():
            for turn in range(times(count)):
                how = "twice" if number == signal.SIGINT and turn % 3 == 0 else ""
                total += disturbed(parent, world, name, number, how, moments)
                figures["signals"] = figures.get("signals", 0) + 1
                total["second signals"] += how == "twice"
        figures |= dict(total)


def test_a_second_ctrl_c_ends_a_command_that_cleans_up_for_long(parent, world):
    moments = random.Random()
    with recorded("a second SIGINT while cleaning up hangs") as figures:
        figures["signals"] = 0
        for name in ("sft", "rlhf", "generate", "filter") * times(2):
            expected = world.expected(parent, name, before=PLANTED)
            moment = moment_of(parent, world, name, moments, 0.5)
            trial = Trial(parent, world, name)
            code, err = trial.strike(signal.SIGINT, moment, how="late", before=planted.call("slow_end", 30))
            trial.judge(signal.SIGINT, code, err, "late")
            figures["signals"] += 1
            figures[f"exit {code}"] = figures.get(f"exit {code}", 0) + 1
            trial.go_on(moments.random() < 0.5)
            trial.check(expected)


def test_a_killed_replacement_leaves_old_or_new(parent, world):
    moments, total = random.Random(), Counter()
    with recorded("kill -9 of sft and generate with --force") as figures:
        for name, count in REPLACED.items():
            new = world.expected(parent, name, before=PLANTED)
            other = ("--seed", 7)
            old = world.expected(parent, name, *other)
            assert old != new
            for _ in range(times(count)):
                moment = moment_of(parent, world, name, moments, 1.1)
                trial = Trial(parent, world, name)
                shutil.copytree(world.root / "expected" / f"{name}---seed-7", trial.out)
                code, err = trial.strike(signal.SIGKILL, moment, "--force")
                assert code in (0, -9) and "Traceback" not in err
                found = {k: v for k, v in files_of(trial.out).items() if not k.startswith(("checkpoints", "run.json"))}
                assert found in (old, new) and fault_of(trial.out) == ""
                total["old there" if found == old else "new there"] += 1
                flags = ["--force", *(["--resume"] if (trial.folder / ".out.partial").exists() else [])]
                code, _, err = trial.start(*flags).finish()
                if code and "no interrupted run exists" in err:
                    code, _, err = trial.start("--force").finish()
                assert code == 0, err
                trial.check(new)
                total["kills"] += 1
        figures |= dict(total)
