"""The anchor on the shards of several processes is, bit for bit, the average of the gathered weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_vllm
import pytest
import torch
from processes import BARE_CHECKOUT
from rl_job import environment, write_job
from rl_processes import SECONDS

from gemma2.posttrain.rl.ema import EmaAnchor
from gemma2.posttrain.rl.rloo import AnchorUpdate

SCRIPT = Path(__file__).with_name("shards_job.py")


class State:
    """What a callback reads of a trainer's state."""

    global_step = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = write_job(tmp_path_factory.mktemp("job"))
    (root / "shards.py").write_text(BARE_CHECKOUT + SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    return root


def on_shards(folder, processes, nodes=1):
    """What every process has found."""
    out = folder / f"{processes}-{nodes}.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    done = subprocess.run(
        [*start, str(folder / "shards.py"), str(folder), str(out), str(nodes)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(folder) | {"PYTHONPATH": f"{folder}{os.pathsep}{Path(fake_vllm.__file__).parent}"},
        check=False,
    )
    assert out.exists(), done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


def check(every, shards):
    for found in every:
        for kind in ("full", "dense", "factors"):
            seen = found[kind]
            assert seen["equal"], kind
            assert seen["error"] <= 1e-6
            assert seen["divided"] and seen["scores"] and seen["finite"] and seen["refused"], (kind, seen)
        lent = found["lending"]
        assert lent["equal"] and lent["rounded"] and lent["kinds"] and lent["tied"] and lent["head"], lent
        assert lent["whole"] > 10**4  # bytes of the loaded model
        assert lent["closed"] <= 8 and lent["layers"] <= 8  # bytes a tensor
    # All parts together are the whole, held as often as there are replicas.
    assert sum(found["full"]["share"] for found in every) == pytest.approx(len(every) / shards)


@pytest.fixture(scope="module")
def of_two(folder):
    return on_shards(folder, 2)


def test_anchors_on_the_shards_of_two_processes(of_two):
    check(of_two, 2)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_gets_what_the_shards_hold_after_every_step(of_two, mode):
    for rank, every in enumerate(of_two):
        for found in every[mode]:
            assert found["same"]
            assert found["engines"] == (1 if mode == "colocate" or rank == 0 else 0)
            own = found["drawn"][rank]
            assert [len(ids) for ids in own[0]] == own[1] and len(own[0]) == 2
            if mode == "colocate":
                assert abs(found["mismatch"]) < 1e-5  # log-probs of the engine against those of the lent policy


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "nodes"), [(1, 1), (3, 1), (4, 1), (4, 2)])
def test_anchors_on_the_shards_of_more_processes_and_of_two_machines(folder, processes, nodes):
    every = on_shards(folder, processes, nodes)
    check(every, processes // nodes)
    assert every[0]["full"]["uneven"] == (processes == 3)


def test_an_anchor_in_bf16_in_place_would_lose_most_of_the_move():
    """1000 steps of 1e-6 in one direction, mu = 0.01: 8 % of the exact average's move is made, in fp32 all of it."""
    generator, mu, steps = torch.Generator().manual_seed(0), 0.01, 1000
    start = (torch.randn(20_000, generator=generator) * 0.02).double()
    direction = torch.randn(20_000, generator=generator).sign().double()
    policy = torch.nn.ParameterDict({"weight": torch.nn.Parameter(start.float())})
    exact, narrow = start.clone(), start.bfloat16()
    anchor = EmaAnchor(policy)
    for step in range(1, steps + 1):
        theta = start + step * 1e-6 * direction
        with torch.no_grad():
            policy["weight"].copy_(theta)
        anchor.update(policy, mu)
        exact.lerp_(theta, mu)
        narrow.lerp_(theta.bfloat16(), mu)
    move = exact - start

    def share(found, begin):
        return float((found.double() - begin.double()) @ move / (move @ move))

    assert share(anchor.shadow["weight"], start.float()) == pytest.approx(1, abs=1e-3)
    assert share(narrow, start.bfloat16()) < 0.5


def test_ema_every_moves_the_anchor_at_its_multiples_whatever_step_a_run_resumes_from():
    moved = []

    class Anchor:
        def update(self, policy, mu):
            moved.append(State.global_step + 1)

    callback = AnchorUpdate(Anchor(), None, 0.1, every=3)
    for first, last in ((0, 4), (4, 10)):  # stopped after four steps, and resumed
        for State.global_step in range(first, last):
            callback.on_optimizer_step(None, State, None)
    assert moved == [3, 6, 9]
