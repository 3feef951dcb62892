"""Every call that changes a file fails, or is the last: one line or the right bytes, and the next start completes it."""

import os

import pytest
from blows import MODES, Place, chosen
from ledger import recorded
from world import World
from zygote import has_compiler, zygote

SHARE = float(os.environ.get("GEMMA2_TORTURE_SHARE", "1"))
JOBS = ("merge", "generate", "filter", "sft", "distill", "reward", "rlhf", "rlhf lora", "pareto", "warp", "pipeline")

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(not has_compiler(), reason="needs Linux and a C compiler, to put itself before the C library"),
]


@pytest.fixture(scope="module")
def parent():
    with zygote(calls=True) as started:
        yield started


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", JOBS)
def test_a_call_that_fails_is_one_line_and_the_next_start_ends_with_the_right_bytes(parent, world, name):
    place = Place(parent, world, name)
    code, err, calls = place.run()
    assert code == 0, err
    expected = world.expected(parent, name)
    faults = []
    with recorded(f"failing calls of `{name}`") as figures:
        figures["calls found"] = len(calls)
        for word in os.environ.get("MODES", " ".join(MODES)).split():
            mode = MODES[word]
            picked = chosen(calls, mode, SHARE)
            figures[mode.counts] = len(picked)
            for call in picked:
                fault = Place(parent, world, name).blow(call, mode, [expected])
                if fault:
                    faults.append(f"{word} at {call.number} {call.name} {call.path}: {fault}")
    if faults:
        pytest.fail(f"{len(faults)} faults\n" + "\n".join(faults), pytrace=False)
