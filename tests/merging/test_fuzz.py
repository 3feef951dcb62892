"""Damaged inputs: each ends as one clear error with nothing left, or as the merge of what the files then say.

Bytes are flipped, cut out, doubled and torn off in headers, indexes, configurations, adapters and manifests; and values
in their JSON are exchanged for others that a program may stumble over. What a merge makes of it is compared with
float64 arithmetic on the inputs as the safetensors library reads them.
"""

import copy
import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from faults import TOKENIZER, snapshot, temporaries
from model_files import added, entries, random_arrays, read_model, read_raw, safetensors_bytes, write_model

from gemma2.merging import MergeRequest, engine, merge, outputs
from gemma2.merging.errors import Gemma2Error

SECONDS = 20  # more than any merge of these takes on a busy machine
Q, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.embed_tokens.weight"
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

# Values that stand where others are expected.
ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e300, 1e-300),
    *(float("nan"), float("inf"), "", "x", "a\nb", "a\x00b", "\x1b[2J", "\ud800", "../rl-1/config.json", "/etc/passwd"),
    *("BF16", "F16", "F32", "I8", "F64", "LORA", "Gemma2ForCausalLM", "complete", "x" * 5000, "é" * 300, "(a+)+$"),
    *([], {}, [[]], [0], [8, 8], [-1], [None], [1.5], [0, 10**30], ["x"], [{}], {"x": 1}, {"": None}, {"x": {"y": []}}),
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "versions", dict)
    monkeypatch.setattr(outputs, "metadata_version", lambda: "test")
    base = random_arrays(0)
    write_model(tmp_path / "base", base, "F32")
    write_model(tmp_path / "rl-1", added(base, random_arrays(1, 0.1)), "BF16", shards=2)
    write_model(tmp_path / "rl-2", added(base, random_arrays(2, 0.1)), "F16")
    generator = np.random.default_rng(3)
    (tmp_path / "lora").mkdir()
    pair = {f"{PEFT}{Q}.lora_A.weight": (2, 8), f"{PEFT}{Q}.lora_B.weight": (8, 2)}
    arrays = {name: generator.standard_normal(shape) for name, shape in pair.items()}
    (tmp_path / "lora/adapter_model.safetensors").write_bytes(safetensors_bytes(entries(arrays, "F32")))
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(LORA))
    init = outputs.digest_weights(tmp_path / "base")
    for name in ("rl-1", "rl-2"):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        parent = {"role": "policy", "path": "../base", "weights": init}
        outputs.write_manifest(tmp_path / name, {"status": "complete", "parents": [parent]})
    (tmp_path / "rl-2" / "tokenizer.json").write_text(json.dumps(TOKENIZER, indent=1))  # equal in another spelling
    return tmp_path


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(data, dice):
    where = dice.randrange(len(data))
    return data[:where] + bytes([data[where] ^ (1 << dice.randrange(8))]) + data[where + 1 :]


def overwrite(data, dice):
    where = dice.randrange(len(data))
    return data[:where] + bytes([dice.randrange(256)]) + data[where + 1 :]


def cut_out(data, dice):
    where = dice.randrange(len(data))
    return data[:where] + data[where + dice.randint(1, 20) :]


def double(data, dice):
    where = dice.randrange(len(data))
    return data[:where] + data[where : where + dice.randint(1, 40)] + data[where:]


def tear_off(data, dice):
    return data[: dice.randrange(len(data))]


def places(value, path=()):
    """Paths to every value inside a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def exchange_value(data, dice):
    """Another value, or another key, somewhere in the JSON."""
    try:
        document = json.loads(data)
    except ValueError:
        return flip(data, dice)
    path = dice.choice(list(places(document)))
    odd = copy.deepcopy(dice.choice(ODD))
    if not path:
        return json.dumps(odd).encode()
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if isinstance(inner, dict) and dice.random() < 0.25:
        inner[odd if isinstance(odd, str) else str(odd)] = inner.pop(path[-1])
    else:
        inner[path[-1]] = odd
    return json.dumps(document).encode()


DAMAGE = (flip, overwrite, cut_out, double, tear_off, exchange_value, exchange_value, exchange_value, exchange_value)


def damage_header(data, dice, how):
    """Of a safetensors file the length and the JSON, not the numbers; the length follows the JSON half of the time."""
    length = int.from_bytes(data[:8], "little")
    if how is exchange_value or dice.random() < 0.5:
        text = how(data[8 : 8 + length], dice)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    if how is tear_off:
        return how(data, dice)
    return how(data[: 8 + length], dice) + data[8 + length :]


TARGETS = (
    *("rl-1/model.safetensors.index.json", "rl-1/model-00001-of-00002.safetensors", "rl-1/config.json"),
    *("rl-1/gemma2.json", "rl-2/model.safetensors", "rl-2/gemma2.json", "rl-2/tokenizer.json", "base/config.json"),
    *("base/model.safetensors", "lora/adapter_config.json", "lora/adapter_model.safetensors"),
)


@contextmanager
def damaged(root, dice):
    """One file of the inputs is damaged, or in one of four cases the same file of two models alike."""
    target = dice.choice(TARGETS)
    files = [target]
    if dice.random() < 0.25 and target.endswith("config.json") and not target.startswith("lora"):
        files = [f"{name}/config.json" for name in ("base", "rl-1", "rl-2")]
    how, state = dice.choice(DAMAGE), dice.getrandbits(32)
    whole = {file: (root / file).read_bytes() for file in files}
    for file, data in whole.items():
        own = random.Random(state)
        changed = damage_header(data, own, how) if file.endswith(".safetensors") else how(data, own)
        (root / file).write_bytes(changed)
    try:
        yield target, how.__name__
    finally:
        for file, data in whole.items():
            (root / file).write_bytes(data)


# --- what must come out -----------------------------------------------------------------------------------------------


def requested(root, target, dice):
    """A merge that reads the target."""
    plain, adapted = (root / "rl-1", root / "rl-2"), (root / "rl-1", Path(f"{root}/rl-2+{root}/lora"))
    if target.startswith("lora"):
        return MergeRequest(method="linear", models=adapted, threads=1)
    if target.startswith("base"):
        return MergeRequest(method="liti", models=(root / "rl-2",), base=root / "base", etas=(0.25,), threads=1)
    if dice.random() < 0.3:
        return MergeRequest(method="slerp", models=plain, threads=1)  # its base is what the manifests record
    return MergeRequest(method="linear", models=dice.choice((plain, plain[::-1])), threads=1)


def operand(root, path):
    """A model or MODEL+ADAPTER as float64, its stored values as the safetensors library has them."""
    model, plus, _ = str(path).rpartition("+")
    arrays = read_model(Path(model if plus else path))
    if plus:
        config = json.loads((root / "lora/adapter_config.json").read_text())
        factors = {name.removeprefix(PEFT): value for name, value in read_model(root / "lora").items()}
        for name in [name for name in factors if name.endswith(".lora_A.weight")]:
            module = name.removesuffix(".lora_A.weight")
            a, b = factors[name], factors[f"{module}.lora_B.weight"]
            rank, alpha = (
                chosen(config[key], config.get(patterns), module)
                for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
            )
            update = alpha / (rank**0.5 if config.get("use_rslora") else rank) * (b @ a)
            arrays[f"{module}.weight"] = arrays[f"{module}.weight"] + (
                update.T if config.get("fan_in_fan_out") else update
            )
    return arrays


def chosen(value, patterns, module):
    return next((own for key, own in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), value)


def reference(root, request):
    """The merge in float64; None for slerp, whose coefficients have tests of their own."""
    values = [operand(root, path) for path in request.models]
    if request.method == "slerp":
        return None
    if request.method == "liti":
        base = operand(root, request.base)
        return {name: base[name] + 0.25 * (values[0][name] - base[name]) for name in base}
    return {name: (values[0][name] + values[1][name]) / 2 for name in values[0]}


@contextmanager
def no_hang():
    def late(number, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(root, request):
    """ "refused" or "merged"; anything else is a failure of the test."""
    before = snapshot(root)
    try:
        with no_hang():
            merge(request, out=root / "out")
    except Gemma2Error as error:
        assert str(error).isprintable(), repr(str(error))
        assert len(str(error)) < 2000
        assert snapshot(root) == before
        return "refused"
    assert temporaries(root) == []
    expected = reference(root, request)
    found = read_model(root / "out")
    kinds = {name: dtype for name, (dtype, _, _) in read_raw(root / "out").items()}
    if expected is not None:
        assert found.keys() == expected.keys()
        for name, value in found.items():
            # Half a step of the stored dtype, and what fp32 adds to it.
            step = {"BF16": 1.01 * 2.0**-8, "F16": 1.01 * 2.0**-11, "F32": 2.0**-22}[kinds[name]]
            np.testing.assert_allclose(value, expected[name], rtol=step, atol=1e-7, err_msg=name)
    assert np.isfinite(np.concatenate([value.ravel() for value in found.values()])).all()
    shutil.rmtree(root / "out")
    return "merged"


def fuzz(root, seeds):
    counts, bugs = Counter(), []
    for seed in seeds:
        dice = random.Random(seed)
        with damaged(root, dice) as (target, how):
            request = requested(root, target, dice)
            try:
                counts[run(root, request)] += 1
            except Exception as error:
                bugs.append(f"seed {seed}, {how} of {target}, {request.method}: {type(error).__name__}: {error}")
                for path in [root / "out", *root.glob(".out*")]:
                    shutil.rmtree(path, ignore_errors=True)
    return counts, bugs


def test_damaged_inputs_end_as_an_error_or_as_the_right_merge(root):
    """A few hundred; `make torture` tries thousands."""
    counts, bugs = fuzz(root, range(250))
    assert not bugs, "\n".join(bugs)
    assert counts["refused"] > 100
    assert counts["merged"] > 30


@pytest.mark.torture
def test_thousands_of_damaged_inputs(root):
    share = float(os.environ.get("GEMMA2_TORTURE_SHARE", "1"))
    counts, bugs = fuzz(root, range(1000, 1000 + round(12_000 * share)))
    sys.stdout.write(f"\ndamaged inputs: {dict(counts)}\n")
    assert not bugs, "\n".join(bugs)


# --- malformed by hand --------------------------------------------------------------------------------------------------


def put(path, value):
    """A JSON document in place of a file, with keys of the document that was there."""
    known = json.loads((path).read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | value))


def change_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def place_a_tensor(root, file):
    index = root / "rl-1/model.safetensors.index.json"
    put(index, {"weight_map": json.loads(index.read_text())["weight_map"] | {"model.norm.weight": file}})


def replace_by(root, name, make):
    (root / name).unlink()
    make(root / name)


def other_tokenizer(root, **keys):
    (root / "rl-2/tokenizer.json").write_text(json.dumps(TOKENIZER | keys))


DIGITS = "9" * 5000  # Python refuses to convert them
MALFORMED = {
    "NUL in the name of a shard": (lambda root: place_a_tensor(root, "a\x00b"), r"in a\x00b, not a file name"),
    "line break in the name of a shard": (lambda root: place_a_tensor(root, "a\nb"), r"in a\nb, not a file name"),
    "half a character in the name of a shard": (lambda root: place_a_tensor(root, "\ud800"), "not a file name"),
    "name of a shard too long": (lambda root: place_a_tensor(root, "a" * 5000), "not a file name"),
    "endless number in a header": (
        lambda root: change_header(root / "rl-2/model.safetensors", lambda text: text.replace(b"[8]", DIGITS.encode())),
        "rl-2/model.safetensors: the header is not JSON (ValueError)",
    ),
    "endless number in a configuration": (
        lambda root: (root / "rl-2/config.json").write_text(f'{{"a": {DIGITS}}}'),
        "rl-2/config.json is not readable JSON (ValueError)",
    ),
    "endless number in a manifest": (
        lambda root: (root / "rl-2/gemma2.json").write_text(f'{{"a": {DIGITS}}}'),
        "rl-2/gemma2.json is not readable JSON (ValueError)",
    ),
    "deep header": (
        lambda root: change_header(root / "rl-2/model.safetensors", lambda text: b'{"a":' + b"[" * 100_000),
        "the header is not JSON (RecursionError)",
    ),
    "deep manifest": (
        lambda root: (root / "rl-2/gemma2.json").write_text("[" * 100_000),
        "rl-2/gemma2.json is not readable JSON (RecursionError)",
    ),
    "half a character in the name of a tensor": (
        lambda root: change_header(
            root / "rl-2/model.safetensors", lambda text: text.replace(b'"model.norm.weight"', rb'"model.\ud800"')
        ),
        r"the name model.\ud800 is not Unicode text",
    ),
    "manifest that is a folder": (
        lambda root: replace_by(root, "rl-2/gemma2.json", Path.mkdir),
        "rl-2/gemma2.json cannot be read (Is a directory)",
    ),
    "weights that are a folder": (
        lambda root: replace_by(root, "rl-2/model.safetensors", Path.mkdir),
        "rl-2/model.safetensors is not a regular file",
    ),
    "weights that are a pipe": (
        lambda root: replace_by(root, "rl-2/model.safetensors", os.mkfifo),
        "rl-2/model.safetensors is not a regular file",
    ),
    "weights that are a device": (
        lambda root: replace_by(root, "rl-2/model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "rl-2/model.safetensors is not a regular file",
    ),
    "configuration that is a pipe": (
        lambda root: replace_by(root, "rl-2/config.json", os.mkfifo),
        "rl-2 holds no config.json",
    ),
    "control characters in a configuration": (
        lambda root: put(root / "rl-2/config.json", {"hidden_size": "\x1b[2J"}),
        r"hidden_size differs: 8 in model 1",
    ),
    "status that is a book": (
        lambda root: put(root / "rl-2/gemma2.json", {"status": "x" * 100_000}),
        "is an unfinished output (status 'xxx",
    ),
    "tokens without content": (lambda root: other_tokenizer(root, added_tokens=[None]), "description of a tokenizer"),
    "merges that are no list": (
        lambda root: other_tokenizer(root, model={"vocab": {}, "merges": 1}),
        "description of a tokenizer",
    ),
    "a vocabulary of lists": (
        lambda root: other_tokenizer(root, model={"vocab": [[[1], 2]]}),
        "description of a tokenizer",
    ),
    "rank_pattern that is a list": (
        lambda root: put(root / "lora/adapter_config.json", {"rank_pattern": [1]}),
        "adapter_config.json: rank_pattern is [1], not a dict",
    ),
    "modules_to_save that is a number": (
        lambda root: put(root / "lora/adapter_config.json", {"modules_to_save": 5}),
        "adapter_config.json: modules_to_save is 5, not a list",
    ),
    "an alpha that no float holds": (
        lambda root: put(root / "lora/adapter_config.json", {"lora_alpha": 10**400}),
        "not a positive number",
    ),
    "a rank that no float holds": (
        lambda root: put(root / "lora/adapter_config.json", {"r": 10**400}),
        "not a positive number",
    ),
    "an adapted model of no architecture": (
        lambda root: put(root / "rl-2/config.json", {"architectures": 5}),
        "rl-2/config.json does not name one architecture (5)",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_by_hand(root, name):
    damage, message = MALFORMED[name]
    damage(root)
    before = snapshot(root)
    models = (root / "rl-1", Path(f"{root}/rl-2+{root}/lora"))
    with pytest.raises(Gemma2Error) as caught, no_hang():
        merge(MergeRequest(method="linear", models=models), out=root / "out")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert snapshot(root) == before


@pytest.mark.parametrize("path", ["\x00", "\ud800", "a\nb", "", "..", "/dev/zero", 5, None])
@pytest.mark.parametrize("weights", ["blake3:0", 5, None])
def test_a_record_of_a_parent_that_is_no_path_is_no_record(root, path, weights):
    for name in ("rl-1", "rl-2"):
        put(root / name / "gemma2.json", {"parents": [{"role": "policy", "path": path, "weights": weights}]})
    request = MergeRequest(method="warp", models=(root / "rl-1", root / "rl-2"))
    with pytest.raises(Gemma2Error, match="no common parent|it is not there with the same weights"):
        merge(request, out=root / "out")


@pytest.mark.parametrize("entry", [5, None, "x", [], {"digest": 5}, {"size": None, "digest": None}])
def test_digests_in_a_manifest_that_are_none_are_taken_again(root, entry):
    put(root / "rl-2/gemma2.json", {"files": {"model.safetensors": entry}})
    merge(MergeRequest(method="linear", models=(root / "rl-2",)), out=root / "out")
    parents = json.loads((root / "out/gemma2.json").read_text())["parents"]
    (root / "rl-2/gemma2.json").unlink()
    assert parents[0]["weights"] == outputs.digest_weights(root / "rl-2")


def test_paths_that_are_no_utf_8_are_merged_and_recorded(root):
    odd = root / os.fsdecode(b"rl-\xff")
    (root / "rl-1").rename(odd)
    merge(MergeRequest(method="linear", models=(odd, root / "rl-2")), out=root / os.fsdecode(b"out-\xff"))
    manifest = outputs.read_manifest(root / os.fsdecode(b"out-\xff"))
    assert [parent["path"] for parent in manifest["parents"]] == [os.fsdecode(b"../rl-\xff"), "../rl-2"]
