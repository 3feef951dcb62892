"""Kills, signals, races, full fault injection and long fuzzing of merges, with figures: `make torture`.

The default counts are the documented ones. GEMMA2_TORTURE_SHARE=0.1 runs a tenth of each.
"""

import json
import math
import random
import shutil
import signal
from collections import Counter

import pytest
from faults import (
    BROKEN,
    NO_SPACE,
    Faults,
    complete,
    judge_each_call,
    request,
    temporaries,
    weights,
    write_models,
)
from ledger import record, times
from model_files import CONFIG
from processes import MAIN, finish, start
from waiting import clock, pause, seconds_of, wait_for

from gemma2.core.outputs import manifest
from gemma2.core.outputs.manifest import write_manifest
from gemma2.merging import engine, merge
from gemma2.merging.streaming import read_back, writer

pytestmark = pytest.mark.torture

# 3 MB a model: long enough in each phase for a kill to hit it.
LARGER = {
    "model.embed_tokens.weight": (2048, 256),
    "model.layers.0.mlp.up_proj.weight": (1024, 256),
    "model.layers.0.self_attn.q_proj.weight": (1024, 256),
    "model.layers.1.mlp.up_proj.weight": (1024, 256),
    "model.norm.weight": (256,),
}


def report(title, counts):
    """Keep figures for the user of `make torture`, with the seconds since the part before."""
    global _since
    record(title, dict(sorted(counts.items())), clock() - _since)
    _since = clock()


_since = clock()


@pytest.fixture
def root(tmp_path):
    return write_models(tmp_path / "models", LARGER).parent


def command(root, out="out", method="slerp", *more):
    """Start one `gemma2 merge` of the two policies in a separate process."""
    models = root / "models"
    base = () if method == "linear" else ("--base", models / "base")
    words = ("merge", method, models / "rl-1", models / "rl-2", *base, "--out", root / out, "--quiet", *more)
    return start(MAIN, *words)


def succeed(process):
    code, _, err = finish(process)
    assert code == 0, err


def expected(root, method):
    """The files of an undisturbed merge, and its duration from the shell."""
    for _ in range(2):  # the first may have to compile
        seconds = seconds_of(lambda: succeed(command(root, "out", method, "--force")))
    files = weights(root / "out")  # in the same place, whose name is in the model card
    shutil.rmtree(root / "out")
    return files, seconds


def wait_for_work(root, process):
    """Wait until the hidden directory of an output exists, or the process has ended."""
    wait_for(lambda: process.poll() is not None or any(root.glob(".out.tmp-*")))


def strike(root, process, number, seconds, random_seconds):
    """Send a signal at a random moment of the run, in two of three cases while it writes."""
    if random_seconds.random() < 1 / 3:
        pause(random_seconds.uniform(0, seconds))
        phase = "any time"
    else:
        wait_for_work(root, process)
        pause(random_seconds.uniform(0, 0.25 * seconds))
        phase = "while it writes"
    process.send_signal(number)
    return phase


def state(root, old, new):
    """The state of the output's path: nothing, the complete old output, or the complete new one."""
    if not (root / "out").exists():
        return "nothing there"
    files = weights(root / "out")
    assert files in (old, new), f"mixed or torn: {sorted(files)}"
    assert complete(root / "out")
    return "old there" if files == old else "new there"


@pytest.mark.parametrize(("method", "count"), [("slerp", 100), ("ties", 40)])
def test_after_kill_9_the_next_run_succeeds_and_removes_leftovers(root, method, count):
    new, seconds = expected(root, method)
    moments, counts = random.Random(1), Counter()
    for _ in range(times(count)):
        process = command(root, "out", method)
        counts[f"kills {strike(root, process, signal.SIGKILL, seconds, moments)}"] += 1
        code, _, err = finish(process)
        assert code in (0, -signal.SIGKILL), err
        counts["ended before the kill"] += code == 0
        counts[state(root, None, new)] += 1
        counts["left temporaries"] += bool(temporaries(root))
        shutil.rmtree(root / "out", ignore_errors=True)
        code, _, err = finish(command(root, "out", method))
        assert code == 0, err
        assert weights(root / "out") == new
        assert temporaries(root) == []
        shutil.rmtree(root / "out")
    report(f"kill -9 of merge {method}", counts)


def test_kill_9_of_a_replacement_leaves_old_or_new_and_never_a_mixture(root):
    new, seconds = expected(root, "slerp")
    old, _ = expected(root, "linear")
    moments, counts = random.Random(2), Counter()
    for _ in range(times(60)):
        merge(request(root / "models", "linear"), out=root / "out", force=True)
        process = command(root, "out", "slerp", "--force")
        counts[f"kills {strike(root, process, signal.SIGKILL, seconds, moments)}"] += 1
        finish(process)
        found = state(root, old, new)
        assert found != "nothing there"
        counts[found] += 1
        code, _, err = finish(command(root, "out", "slerp", "--force"))
        assert code == 0, err
        assert weights(root / "out") == new
        assert temporaries(root) == []
    report("kill -9 of merge slerp --force", counts)


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_leaves_nothing_and_its_exit_code(root, number, wanted):
    new, seconds = expected(root, "slerp")
    old, _ = expected(root, "linear")
    moments, counts = random.Random(int(number)), Counter()
    for turn in range(times(60)):
        force = turn % 3 == 0
        if force:
            merge(request(root / "models", "linear"), out=root / "out")
        process = command(root, "out", "slerp", *(["--force"] if force else []))
        # The handler is installed after the interpreter has started; before, the system's default ends the process.
        pause(min(0.1, seconds / 4))
        counts[f"signals {strike(root, process, number, seconds, moments)}"] += 1
        code, _, err = finish(process)
        assert code in (0, wanted, -number), (code, err)
        counts[f"exit {code}"] += 1
        assert "Traceback" not in err, err
        assert temporaries(root) == []
        found = state(root, old if force else None, new)
        assert found in {0: ("new there",)}.get(code, ("old there" if force else "nothing there", "new there"))
        counts[found] += 1
        shutil.rmtree(root / "out", ignore_errors=True)
    report(f"{signal.Signals(number).name} of merge slerp", counts)


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_of_two_runs_to_one_output_one_wins_and_the_other_fails_clearly(root, force):
    new, seconds = expected(root, "slerp")
    other, _ = expected(root, "linear")
    moments, counts = random.Random(3), Counter()
    for _ in range(times(25)):
        flags = ["--force"] if force else []
        first = command(root, "out", "slerp", *flags)
        pause(moments.uniform(0, 0.1 * seconds))
        second = command(root, "out", "linear", *flags)
        ends = [finish(first), finish(second)]
        codes = [code for code, _, _ in ends]
        assert 0 in codes, ends
        for code, _, err in ends:
            assert code in (0, 1), err
            assert "Traceback" not in err
            if code == 1:
                assert err.count("\n") == 1, err
                assert "another gemma2 process is writing" in err or "exists" in err or "appeared" in err, err
        counts["one won" if 1 in codes else "one after the other"] += 1
        assert force or 1 in codes
        assert temporaries(root) == []
        counts["slerp there" if state(root, other, new) == "new there" else "linear there"] += 1
        shutil.rmtree(root / "out")
    report(f"pairs of runs{' with --force' if force else ''}", counts)


@pytest.mark.parametrize("method", ["slerp", "linear", "ties", "dare", "della"])
@pytest.mark.parametrize("code", [NO_SPACE, BROKEN, None], ids=["ENOSPC", "EIO", "half"])
@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_every_call_fails_once(tmp_path, monkeypatch, method, code, force):
    monkeypatch.setattr(engine, "versions", dict)
    monkeypatch.setattr(manifest, "metadata_version", lambda: "test")
    totals = Counter()
    for direct in (False, True):
        if direct:
            monkeypatch.setattr(writer, "DIRECT_BYTES", 0)
            monkeypatch.setattr(read_back, "DIRECT_BYTES", 0)
        with monkeypatch.context() as patch:
            root = write_models(tmp_path / str(direct))
            totals += judge_each_call(root, Faults(patch, root), code, method, force)
    how = {NO_SPACE: "ENOSPC", BROKEN: "EIO", None: "half done"}[code]
    report(f"each call of a merge fails, in process (5 methods, with and without --force): {how}", totals)


# --- memory -----------------------------------------------------------------------------------------------------------

WATCHED = """
import json, shutil, sys, threading, types
from pathlib import Path
from gemma2.merging import MergeRequest, merge, plan_merge

peak = {"RssAnon": 0, "VmRSS": 0}
done = threading.Event()

def sample():
    while not done.wait(0.005):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(rest.split()[0]) * 1024)

threading.Thread(target=sample, daemon=True).start()
root, method, dry = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "dry"
if dry:  # nothing is written, so the disk need not have the room
    shutil.disk_usage = lambda place: types.SimpleNamespace(free=2**60)
base = {} if method == "linear" else {"base": root / "base"}
models = (root / "rl-1", root / "rl-2")
request = MergeRequest(method=method, models=models, **base)
plan_merge(request, root / "out") if dry else merge(request, out=root / "out")
done.set()
print(json.dumps(peak))
"""


def write_sparse(path, shapes):
    """Zeros that use no disk space, one tensor per file."""
    path.mkdir(parents=True)
    layers = 1 + max(int(name.split(".")[2]) for name in shapes)
    (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    weight_map = {}
    for number, (name, shape) in enumerate(shapes.items()):
        file = f"model-{number + 1:05d}-of-{len(shapes):05d}.safetensors"
        size = 2 * math.prod(shape)
        header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
        with (path / file).open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + size)
        weight_map[name] = file
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_manifest(path, {"status": "complete"}, dict.fromkeys(weight_map.values(), "blake3:0"))  # they are not hashed


@pytest.mark.parametrize(
    ("method", "layers", "dry"),
    [("slerp", 8, ""), ("linear", 8, ""), ("ties", 2, ""), ("della", 2, ""), ("slerp", 200, "dry")],
)
def test_memory_stays_under_its_ceiling(tmp_path, method, layers, dry):
    """268 MB a layer, so 2.1 GB are merged, and 54 GB are planned."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (8192, 16384) for i in range(layers)}
    for name in ("base", "rl-1", "rl-2"):
        write_sparse(tmp_path / name, shapes)
    code, out, err = finish(start(WATCHED, tmp_path, method, dry))
    assert code == 0, err
    peak = json.loads(out)
    megabytes = {name: size // 10**6 for name, size in peak.items()}
    report(f"merge {method}{' --dry-run' if dry else ''} of {layers * 268} MB", megabytes)
    assert peak["RssAnon"] <= 300e6
    assert peak["VmRSS"] <= 600e6
