"""Every training command and generate, killed when a checkpoint is there, go on with the same bytes.

In place, with the work folder moved, and with the inputs elsewhere than recorded.
"""

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

pytestmark = pytest.mark.torture

STEPS = 12
LONGER = {
    "sft": ("--max-steps", STEPS),
    "distill": ("--steps", STEPS),
    "reward": ("--max-steps", STEPS),
    "rlhf": ("--steps", STEPS),
    "rlhf lora": ("--steps", STEPS),
    "generate": ("--n", 4),  # of 12 prompts, in batches of 4
}
PLACES = 10  # random steps of each command


@pytest.fixture(scope="module")
def parent():
    with zygote() as started:
        yield started


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("resumes"))


def kill_at(name, step):
    """The source that kills a command at a step."""
    return planted.call("kill_at_records" if name == "generate" else "kill_at_checkpoint", step)


def steps_of(name, count):
    """Random steps before the last, different ones where there are enough."""
    possible = list(range(1, STEPS))
    random.shuffle(possible)
    return (possible * count)[:count]


@pytest.mark.parametrize("name", LONGER)
def test_a_run_that_is_killed_at_a_checkpoint_goes_on_with_the_same_bytes(parent, world, name):
    expected = world.expected(parent, name, *LONGER[name])
    with recorded(f"resume of {name} at random steps, in place and moved") as figures:
        counts = Counter()
        for turn, step in enumerate(steps_of(name, times(PLACES))):
            place = ("in place", "folder moved", "inputs elsewhere")[turn % 3]
            trial = Trial(parent, world, name, *LONGER[name])
            home = trial.folder / "here" / "inputs"
            shutil.copytree(world.root, home, ignore=shutil.ignore_patterns("trial", "expected"))
            trial.out = home.parent / "out"
            code, _, err = trial.start(before=kill_at(name, step), cwd=home).finish()
            assert code == -signal.SIGKILL, (code, err, step)
            if place != "in place":
                moved = home.parent.rename(trial.folder / "there")
                trial.out = moved / "out"
                home = moved / "inputs"
            if place == "inputs elsewhere":
                home = home.rename(trial.folder / "elsewhere")
            code, _, err = trial.start("--resume", cwd=home).finish()
            assert code == 0, (err, step, place)
            found = files_of(trial.out)
            different = {key for key in expected | found if expected.get(key) != found.get(key)}
            assert different == set(), (step, place)
            assert sorted(path.name for path in trial.out.parent.glob(".*")) == []
            counts[place] += 1
        figures |= dict(counts)
