"""Kills, signals, a pair and a clock that is set back, on one command: the short form of `make torture`'s parts."""

import random
import signal
import sys

import planted
import pytest
from strikes import Trial
from world import World
from zygote import zygote

NAME = "filter"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def parent():
    with zygote(commands=[NAME]) as started:
        yield started


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("moments"), models=False)


@pytest.fixture(scope="module")
def seconds(parent, world):
    world.expected(parent, NAME)
    return Trial(parent, world, NAME).seconds()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["KILL", "TERM", "INT"])
def test_the_same_command_ends_with_the_same_bytes(parent, world, seconds, number):
    for turn in range(3):
        trial = Trial(parent, world, NAME)
        how = "twice" if number == signal.SIGINT and turn == 0 else ""
        code, err = trial.strike(number, random.uniform(0, seconds), how=how)
        trial.judge(number, code, err, how)
        trial.go_on(resume=turn == 1)
        trial.check(world.expected(parent, NAME))


def test_of_two_starts_one_wins(parent, world):
    trial = Trial(parent, world, NAME)
    trial.one_wins(trial.start(), trial.start())
    trial.check(world.expected(parent, NAME))


def test_a_clock_that_is_set_back_changes_nothing(parent, world):
    trial = Trial(parent, world, NAME)
    code, _, err = trial.start(before=planted.call("clock", planted.DAY, 5)).finish()
    assert code == 0, err
    trial.check(world.expected(parent, NAME))
