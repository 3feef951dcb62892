"""The short form of tests/torture/test_calls.py: one command, struck at some of its calls that change a file."""

import pytest
from blows import MODES, Place, chosen
from world import World
from zygote import has_compiler, zygote

STRIKES = {"kill": 0.2, "full": 0.2, "eio": 0.3, "interrupted": 0.2, "read-only": 0.2, "vanished": 0.4}

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs Linux and a C compiler")


def test_a_call_that_fails_is_one_line_and_the_next_start_ends_with_the_right_bytes(tmp_path):
    world = World(tmp_path, models=False)
    with zygote(calls=True, commands=["filter"]) as parent:
        place = Place(parent, world, "filter")
        code, err, calls = place.afresh().run()
        assert code == 0, err
        expected = world.expected(parent, "filter")
        faults = [
            f"{word} at {call.number} {call.name} {call.path}: {fault}"
            for word, share in STRIKES.items()
            for call in chosen(calls, MODES[word], share)
            if (fault := place.afresh().blow(call, MODES[word], [expected]))
        ]
    assert faults == []
