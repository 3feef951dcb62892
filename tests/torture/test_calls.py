"""Every call that changes a file fails, or is the last: one line or the right bytes, and the next start completes it.

What is struck: `chosen` in blows.py. GEMMA2_TORTURE_SHARE=10 strikes at every call; that takes hours.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from blows import ALL, MODES, SHARE, Call, Mode, Place, chosen, replacing
from ledger import recorded
from world import World
from zygote import has_compiler, zygote

# Of commands that write their checkpoints with the same code a part is struck. A pipeline's and warp's own calls are
# those of the scheduler: their stages are the other commands.
SHARES = {
    **{"merge": 1, "generate": 1, "filter": 1, "pareto": 0.6, "pipeline": 1, "warp": 0.3},
    **{"sft": 1, "distill": 0.25, "reward": 0.25, "rlhf": 0.3, "rlhf lora": 0.3},
}
REPLACED = {"merge": "filter", "generate": "merge", "sft": "merge"}  # by --force: a command -> what is there before
EXCHANGED = {"kill": 1, "eio": 3}

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


def struck(
    place: Place, picked: Mapping[str, list[Call]], results: list[Mapping[str, bytes]], figures: dict[str, int]
) -> None:
    """Strike at each of these calls in a fresh folder, and fail with all that was wrong."""
    faults = []
    for word, calls in picked.items():
        mode: Mode = MODES[word]
        figures[mode.counts] = len(calls)
        for call in calls:
            fault = place.afresh().blow(call, mode, results)
            if fault:
                faults.append(f"{word} at {call.number} {call.name} {call.path}: {fault}")
    if faults:
        pytest.fail(f"{len(faults)} faults\n" + "\n".join(faults), pytrace=False)


@pytest.mark.parametrize("name", SHARES)
def test_a_call_that_fails_is_one_line_and_the_next_start_ends_with_the_right_bytes(parent, world, name):
    place = Place(parent, world, name)
    code, err, calls = place.afresh().run()
    assert code == 0, err
    expected = world.expected(parent, name, before=place.before)
    with recorded(f"calls of `{name}` that fail, or are its last") as figures:
        figures["calls found"] = len(calls)
        share = SHARE if SHARE >= ALL else SHARE * SHARES[name]
        struck(place, {word: chosen(calls, mode, share) for word, mode in MODES.items()}, [expected], figures)


@pytest.mark.parametrize("name", REPLACED)
def test_force_leaves_the_old_output_or_the_new_at_every_call_of_its_exchange(parent, world, name):
    old = world.expected(parent, REPLACED[name])
    place = Place(parent, world, name, "--force", old=world.root / "expected" / REPLACED[name])
    code, err, calls = place.afresh().run()
    assert code == 0, err
    expected = world.expected(parent, name)
    with recorded(f"calls of the exchange of `{name} --force`") as figures:
        exchange = replacing(calls)
        figures["calls found"] = len(exchange)
        picked = {word: chosen(exchange, replace(MODES[word], every=every), SHARE) for word, every in EXCHANGED.items()}
        struck(place, picked, [expected, old], figures)
