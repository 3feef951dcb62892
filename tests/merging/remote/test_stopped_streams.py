"""A merge by the command line that is interrupted or killed while its models arrive, and the run after it."""

import os
import signal
import threading

import pytest
from fake_hub import FakeHub
from model_files import random_arrays, write_model
from processes import MAIN, finish, gemma2, start
from test_stream import point_at
from waiting import PATIENCE, wait_for

from gemma2.cli.app import invoke
from gemma2.core.errors import UsageError
from gemma2.merging import MergeRequest, merge

BIG = {
    "model.embed_tokens.weight": (2048, 1024),
    **{f"model.layers.{layer}.mlp.up_proj.weight": (1024, 1024) for layer in range(3)},
}
HELD = 12 << 20  # ranges from here on are held back: in the last two layers


@pytest.fixture
def hub(tmp_path):
    models = {
        f"org/{name}": write_model(tmp_path / name, random_arrays(seed, shapes=BIG))
        for seed, name in ((1, "a"), (2, "b"))
    }
    with FakeHub(models).serving() as served:
        yield served


def environment(hub, tmp_path):
    offline = {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DOWNLOAD_TIMEOUT": str(int(PATIENCE))}
    return {**os.environ, **offline, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}


def arguments(out):
    return ["merge", "linear", "org/a", "org/b", "--stream", "--out", out]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_stream_leaves_nothing_that_counts_as_whole_and_the_next_run_takes_it_up(hub, tmp_path, number, code):
    released = threading.Event()
    held = []

    def hold(name, first, end):
        if first >= HELD and not released.is_set():
            held.append(first)
            released.wait(PATIENCE)

    hub.fault = hold
    env = environment(hub, tmp_path)
    process = start(MAIN, *arguments("out"), cwd=tmp_path, env=env)
    wait_for(lambda: process.poll() is not None or (held and hub.sent >= 12 << 20))
    wait_for(lambda: process.poll() is not None or any((tmp_path / "home").rglob("*.ranges")))
    process.send_signal(number)
    status, _, error = finish(process)
    assert status == code, error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "home").rglob("snapshots/*/*.safetensors"))
    assert list((tmp_path / "home").rglob("*.gemma2.incomplete"))
    released.set()
    before, hub.sent = hub.sent, 0
    status, _, error = gemma2(*arguments("out"), cwd=tmp_path, env=env)
    assert status == 0, error
    total = sum((folder / "model.safetensors").stat().st_size for folder in hub.models.values())
    assert hub.sent < total
    assert before
    merge(MergeRequest(method="linear", models=(tmp_path / "a", tmp_path / "b")), out=tmp_path / "local")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()
    assert not list((tmp_path / "home").rglob("*.incomplete*"))


def test_a_file_and_a_plan_take_the_option_too(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    point_at(hub, tmp_path / "hub", monkeypatch)
    (tmp_path / "one.yaml").write_text("method: linear\nmodels: [org/a, org/b]\nstream: true\n")
    assert invoke(["merge", "plan", "--config", "one.yaml"]) == 0
    assert max(end for _, _, end in hub.ranges) <= 1 << 18
    assert invoke(["merge", "plan", "--stream", "linear", "org/a", "org/b"]) == 0
    assert max(end for _, _, end in hub.ranges) <= 1 << 18
    capsys.readouterr()
    assert invoke(["merge", "--config", "one.yaml", "--out", "out"]) == 0
    assert "weight files arrive while they are merged" in capsys.readouterr().err
    with pytest.raises(UsageError, match="stream is 1, not true or false"):
        invoke(["merge", "--config", "one.yaml", "--set", "stream=1", "--out", "o"])
