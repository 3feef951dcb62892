"""Makes a merge fail on purpose and checks what it leaves: for the tests of faults, kills and malformed inputs."""

import builtins
import errno
import io
import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from blake3 import blake3
from model_files import added, entries, random_arrays, safetensors_bytes, write_model

from gemma2.core.errors import Gemma2Error
from gemma2.core.outputs import digests, manifest, staging
from gemma2.merging import MergeRequest, merge

NO_SPACE, BROKEN = errno.ENOSPC, errno.EIO
HALVES = ("pwrite", "preadv", "sendfile")  # calls that move bytes, and may move fewer than requested
# Whole pages and a rest: with O_DIRECT some tensors go past the page cache, and some through it.
SHAPES = {
    "model.embed_tokens.weight": (64, 64),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.1.mlp.up_proj.weight": (96, 64),
    "model.norm.weight": (64,),
}
SECONDS = 20  # more than any merge of these takes on a busy machine
Q = "model.layers.0.self_attn.q_proj"
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 3,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "rl-2",
}
PEFT = "base_model.model."
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


def write_models(root: Path, shapes=SHAPES, dtype="BF16", config=None) -> Path:
    """An init `base` and two policies of it, `rl-1` and `rl-2`, with a tokenizer."""
    base = random_arrays(0, shapes=shapes)
    write_model(root / "base", base, dtype, config=config)
    for number in (1, 2):
        write_model(root / f"rl-{number}", added(base, random_arrays(number, 0.1, shapes)), dtype, config=config)
    for name in ("base", "rl-1", "rl-2"):
        (root / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return root


def request(root: Path, method: str = "slerp", **options) -> MergeRequest:
    """A merge of the two policies; `linear` without their init, which it does not accept."""
    base = {} if method == "linear" else {"base": root / "base"}
    return MergeRequest(**({"method": method, "models": (root / "rl-1", root / "rl-2"), "threads": 1} | base | options))


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too; folders as b"/", other entries as b"?"."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"/" if path.is_dir() else b"?"
        for path in sorted(directory.rglob("*"))
    }


def weights(directory: Path) -> dict[str, bytes]:
    """All files of an output except its manifest, which holds the time."""
    return {name: data for name, data in snapshot(directory).items() if name != manifest.MANIFEST}


def temporaries(root: Path) -> list[str]:
    """Hidden files and folders: unfinished outputs and locks."""
    return sorted(str(path.relative_to(root)) for path in root.rglob(".*"))


def complete(directory: Path) -> bool:
    """Whether every file matches the manifest, and none is missing or extra."""
    found_manifest = json.loads((directory / manifest.MANIFEST).read_text())
    files = weights(directory)
    found = {name: {"size": len(data), "digest": f"blake3:{blake3(data).hexdigest()}"} for name, data in files.items()}
    return found_manifest["status"] == "complete" and found_manifest["files"] == found


class Faults:
    """Counts the calls that access files below a folder, and lets one of them fail, or do half of its work.

    calls   names of the calls, in order
    fail    number of the call that fails, or None
    """

    PATHS = ("open", "rename", "replace", "mkdir")
    DESCRIPTORS = ("pwrite", "posix_fallocate", "fsync", "sendfile", "preadv")

    def __init__(self, monkeypatch, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []
        self.fail: int | None = None
        self.code: int | None = None
        for name in (*self.PATHS, *self.DESCRIPTORS):
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))
        opened = self._opened(io.open)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(staging, "exchange", self._failing("exchange", staging.exchange))

    def arm(self, number: int | None, code: int | None) -> None:
        """Let call `number` fail with an errno; without an errno it does half of its work."""
        self.calls, self.fail, self.code = [], number, code

    def _due(self, name: str) -> bool:
        self.calls.append(name)
        return self.fail == len(self.calls) - 1

    def _refuse(self, place: object) -> None:
        if self.code is not None:
            raise OSError(self.code, os.strerror(self.code), str(place))

    def _below(self, place: object) -> bool:
        return not isinstance(place, str | Path) or str(place).startswith(str(self.root))

    def _failing(self, name, function):
        def call(*arguments, **options):
            if self._below(arguments[0]) and self._due(name):
                self._refuse(arguments[0])
                return halved(name, function, arguments)
            return function(*arguments, **options)

        return call

    def _opened(self, function):
        def call(file, mode="r", *arguments, **options):
            if isinstance(file, int) or not self._below(file):
                return function(file, mode, *arguments, **options)
            if self._due(f"open {mode}"):
                self._refuse(file)
            stream = function(file, mode, *arguments, **options)
            return Buffered(stream, self, file) if "w" in mode else stream

        return call


def halved(name, function, arguments):
    """Make the call with half of its bytes, if it takes any: a system may do this at any time."""
    if name == "pwrite":
        descriptor, data, offset = arguments
        return function(descriptor, memoryview(data)[: max(len(data) // 2, 1)], offset)
    if name == "preadv":
        descriptor, (into, *_), offset = arguments
        return function(descriptor, [into[: max(len(into) // 2, 1)]], offset)
    if name == "sendfile":
        target, source, offset, _ = arguments
        return function(target, source, offset, 7)
    return function(*arguments)


class Buffered:
    """A file open for writing: the system sees its bytes when it is flushed or closed, and may refuse them there."""

    def __init__(self, stream, faults: Faults, place: object) -> None:
        self._stream, self._faults, self._place = stream, faults, place

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __enter__(self):
        return self

    def flush(self):
        if self._faults._due("flush"):
            self._faults._refuse(self._place)
        self._stream.flush()

    def __exit__(self, *_):
        self._stream.close()
        if self._faults._due("close"):
            self._faults._refuse(self._place)


@contextmanager
def exchanged_descriptor(descriptor: int, path: str = "/proc/self/mem"):
    """For the duration of the block, the descriptor is one on which the system itself refuses.

    At low offsets of /proc/self/mem nothing is mapped: reading and writing end with EIO.
    """
    kept, other = os.dup(descriptor), os.open(path, os.O_RDWR)
    try:
        os.dup2(other, descriptor)
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(other)


def judge_each_call(root, faults, code, method="slerp", force=False, step=(0, 1), **options):
    """Run a merge once for every `step`-th call that it makes, letting that one fail; counts by outcome.

    Without a code only the calls that move bytes are tried, and do half of their work.
    """
    if force:
        merge(request(root, "linear"), out=root / "out")
    before = snapshot(root)
    inputs = {name: data for name, data in before.items() if not name.startswith("out")}
    faults.arm(None, None)
    merge(request(root, method, **options), out=root / "out", force=force)
    made, expected = list(faults.calls), weights(root / "out")
    assert complete(root / "out")
    tried = [number for number in range(step[0], len(made), step[1]) if code is not None or made[number] in HALVES]
    counts = {"calls": len(made), "tried": len(tried), "refused": 0, "carried on": 0, "refused after the rename": 0}
    for number in tried:
        restore(root, before)
        faults.arm(number, code)
        try:
            merge(request(root, method, **options), out=root / "out", force=force)
            outcome = "carried on"
        except Gemma2Error as error:
            assert "\n" not in str(error)
            outcome = "refused"
        faults.arm(None, None)
        place = f"call {number}, {made[number]}"
        assert temporaries(root) == [], place
        after = snapshot(root)
        assert {name: data for name, data in after.items() if not name.startswith("out")} == inputs, place
        if outcome == "refused" and after != before:
            # Flushing the parent folder or removing the old output failed: the new output is complete.
            outcome = "refused after the rename"
        if outcome != "refused":
            assert complete(root / "out"), place
            assert weights(root / "out") == expected, place
        counts[outcome] += 1
    return counts


def restore(root, files):
    """Restore the output."""
    shutil.rmtree(root / "out", ignore_errors=True)
    for name, data in files.items():
        if name.split("/")[0] == "out":
            (root / name).mkdir() if data == b"/" else (root / name).write_bytes(data)


def write_varied_models(root: Path) -> Path:
    """`base` in fp32, `rl-1` bf16 in two files, `rl-2` fp16, `lora` for rl-2; rl-1 and rl-2 record base as parent."""
    base = random_arrays(0)
    write_model(root / "base", base, "F32")
    write_model(root / "rl-1", added(base, random_arrays(1, 0.1)), "BF16", shards=2)
    write_model(root / "rl-2", added(base, random_arrays(2, 0.1)), "F16")
    generator = np.random.default_rng(3)
    (root / "lora").mkdir()
    pair = {f"{PEFT}{Q}.lora_A.weight": (2, 8), f"{PEFT}{Q}.lora_B.weight": (8, 2)}
    arrays = {name: generator.standard_normal(shape) for name, shape in pair.items()}
    (root / "lora/adapter_model.safetensors").write_bytes(safetensors_bytes(entries(arrays, "F32")))
    (root / "lora/adapter_config.json").write_text(json.dumps(LORA))
    init = digests.digest_weights(root / "base")
    for name in ("rl-1", "rl-2"):
        (root / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        parent = {"role": "policy", "path": "../base", "weights": init}
        manifest.write_manifest(root / name, {"status": "complete", "parents": [parent]})
    (root / "rl-2" / "tokenizer.json").write_text(json.dumps(TOKENIZER, indent=1))  # equal in another spelling
    return root


@contextmanager
def no_hang():
    """A merge that takes longer fails the test."""

    def late(number, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
