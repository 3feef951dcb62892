"""Two starts of one command to one output at once, and clocks that are set back."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import planted
import pytest
from ledger import recorded, times
from strikes import Trial
from waiting import pause
from world import World
from zygote import zygote

pytestmark = pytest.mark.torture

PLANTED = planted.call("forked_stages")
PAIRS = {"sft": 6, "rlhf": 5, "generate": 5, "filter": 4}
CONTINUED = {"sft": 5, "distill": 3, "rlhf": 5, "generate": 2}
PIPELINES = 15
CLOCKS = ("sft", "distill", "rlhf", "generate", "filter", "pipeline")
STEPS = {"sft": 3, "distill": 2, "rlhf": 2}


@pytest.fixture(scope="module")
def parent():
    with zygote() as started:
        yield started


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("pairs"))


def test_of_two_starts_one_wins(parent, world):
    moments = random.Random()
    with recorded("pairs of starts to one output") as figures:
        counts = Counter()
        for name, count in PAIRS.items():
            expected = world.expected(parent, name)
            for _ in range(times(count)):
                trial = Trial(parent, world, name)
                first = trial.start()
                pause(moments.uniform(0, 0.2))
                how = trial.one_wins(first, trial.start())
                assert how == "one was refused"
                counts[how] += 1
                trial.check(expected)
        figures |= dict(counts)


def test_of_a_start_and_a_resume_one_wins(parent, world):
    moments = random.Random()
    with recorded("a start and a --resume at once") as figures:
        counts = Counter()
        for name, count in CONTINUED.items():
            expected = world.expected(parent, name)
            kill = planted.call("kill_at_records" if name == "generate" else "kill_at_checkpoint", 2)
            for turn in range(times(count)):
                trial = Trial(parent, world, name)
                assert trial.start(before=kill).finish()[0] == -signal.SIGKILL
                words = [[], ["--resume"]]
                first = trial.start(*words[turn % 2])
                pause(moments.choice([0, moments.uniform(0, 0.2)]))
                counts[trial.one_wins(first, trial.start(*words[1 - turn % 2]))] += 1
                trial.check(expected)
        figures |= dict(counts)


def test_of_two_pipelines_in_one_folder_one_wins(parent, world):
    moments = random.Random()
    expected = world.expected(parent, "pipeline", before=PLANTED)
    with recorded("two pipelines in one folder") as figures:
        counts = Counter()
        for _ in range(times(PIPELINES)):
            trial = Trial(parent, world, "pipeline")
            first = trial.start()
            pause(moments.uniform(0, 0.5))
            counts[trial.one_wins(first, trial.start())] += 1
            trial.check(expected)
        figures |= dict(counts)


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_that_is_set_back_changes_nothing(parent, world, name):
    """Inputs from tomorrow; the clock goes back a day in the middle of a run, and between a kill and its resume."""
    expected = world.expected(parent, name, before=PLANTED)
    moments = random.Random()
    tomorrow = (world.root / "prompts.jsonl").stat().st_ctime + planted.DAY
    for path in world.root.rglob("*"):
        if path.is_file() and "expected" not in path.parts:
            os.utime(path, (tomorrow, tomorrow))
    with recorded(f"clock set back in {name}") as figures:
        figures["runs"] = 0
        for _ in range(times(3)):
            trial = Trial(parent, world, name)
            ahead = planted.call("clock", moments.choice([planted.DAY, 0.0]), moments.randrange(1, 40))
            code, _, err = trial.start(before=ahead).finish()
            assert code == 0, err
            trial.check(expected)
            trial = Trial(parent, world, name)
            kill = planted.call("kill_at_checkpoint", STEPS[name]) if name in STEPS else ""
            code, _, err = trial.start(before=planted.call("clock", planted.DAY, 10**9) + kill).finish()
            assert code == (-signal.SIGKILL if kill else 0), err
            behind = planted.call("clock", 0.0, moments.randrange(1, 40))
            if kill:
                code, _, err = trial.start("--resume", before=behind).finish()
                assert code == 0, err
            elif name == "pipeline":
                assert trial.start(before=behind).finish()[0] == 0
            trial.check(expected)
            figures["runs"] += 2
