"""Damaged inputs: each gives one clear error with nothing left behind, or the merge of the files' new contents.

Bytes are flipped, cut out, doubled and torn off in headers, indexes, configurations, adapters and manifests; and values
in their JSON are exchanged for others that may break a program. The result of a merge is compared with float64
arithmetic on the inputs, which the safetensors library reads.
"""

import copy
import json
import random
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from faults import PEFT, no_hang, snapshot, temporaries, write_varied_models
from ledger import record, times
from model_files import read_model, read_raw
from waiting import clock

from gemma2.core.errors import Gemma2Error
from gemma2.core.outputs import manifest
from gemma2.merging import MergeRequest, engine, merge

# Values that replace the expected ones.
ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 8, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e300, 1e-300),
    *(float("nan"), float("inf"), "", "x", "a\nb", "a\x00b", "\x1b[2J", "\ud800", "../rl-1/config.json", "/etc/passwd"),
    *("BF16", "F16", "F32", "I8", "F64", "LORA", "Gemma2ForCausalLM", "complete", "x" * 5000, "é" * 300, "(a+)+$"),
    *([], {}, [[]], [0], [8, 8], [-1], [None], [1.5], [0, 10**30], ["x"], [{}], {"x": 1}, {"": None}, {"x": {"y": []}}),
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "versions", dict)
    monkeypatch.setattr(manifest, "metadata_version", lambda: "test")
    return write_varied_models(tmp_path)


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


def nudge(data, dice):
    """The other truth value, or a number close to the original."""
    document = json.loads(data)
    paths = [path for path in places(document) if path and isinstance(inside(document, path), bool | int | float)]
    if not paths:
        return exchange_value(data, dice)
    *above, last = dice.choice(paths)
    inner = inside(document, above)
    inner[last] = not inner[last] if isinstance(inner[last], bool) else inner[last] + dice.choice((-2, -1, 1, 2, 8))
    return json.dumps(document).encode()


def move(data, dice):
    """In a header: move a tensor, with its size kept, or exchange two. Elsewhere change a number slightly."""
    document = json.loads(data)
    tensors = [entry for entry in document.values() if isinstance(entry, dict) and "data_offsets" in entry]
    if not tensors:
        return nudge(data, dice)
    first, second = dice.choice(tensors), dice.choice(tensors)
    if dice.random() < 0.5:
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    else:
        step = dice.choice((-64, -2, 2, 64))
        first["data_offsets"] = [offset + step for offset in first["data_offsets"]]
    return json.dumps(document).encode()


def inside(document, path):
    for key in path:
        document = document[key]
    return document


DAMAGE = (flip, overwrite, cut_out, double, tear_off, *[exchange_value] * 4, nudge, nudge, move)
KEEPS_JSON = (exchange_value, nudge, move)


def damage_header(data, dice, how):
    """Damage length or JSON of a safetensors file, not the numbers; half of the time the length follows the JSON."""
    length = int.from_bytes(data[:8], "little")
    if how in KEEPS_JSON or dice.random() < 0.5:
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
    """Damage one file of the inputs, or in one of four cases the same file of two models in the same way."""
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


# --- expected results -------------------------------------------------------------------------------------------------


def requested(root, target, dice):
    """A merge that reads the target."""
    plain, adapted = (root / "rl-1", root / "rl-2"), (root / "rl-1", Path(f"{root}/rl-2+{root}/lora"))
    if target.startswith("lora"):
        return MergeRequest(method="linear", models=adapted, threads=1)
    if target.startswith("base"):
        return MergeRequest(method="liti", models=(root / "rl-2",), base=root / "base", etas=(0.25,), threads=1)
    if dice.random() < 0.3:
        return MergeRequest(method="slerp", models=plain, threads=1)  # its base is the one in the manifests
    return MergeRequest(method="linear", models=dice.choice((plain, plain[::-1])), threads=1)


def operand(root, path):
    """A model or MODEL+ADAPTER as float64, its stored values read by the safetensors library."""
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
    """The merge in float64; None for slerp, whose coefficients have separate tests."""
    values = [operand(root, path) for path in request.models]
    if request.method == "slerp":
        return None
    if request.method == "liti":
        base = operand(root, request.base)
        return {name: base[name] + 0.25 * (values[0][name] - base[name]) for name in base}
    return {name: (values[0][name] + values[1][name]) / 2 for name in values[0]}


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
            # Half a step of the stored dtype, plus the rounding of fp32.
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


def test_damaged_inputs_give_an_error_or_the_right_merge(root):
    """A few hundred; `make torture` tries thousands."""
    counts, bugs = fuzz(root, range(300))
    assert not bugs, "\n".join(bugs)
    assert counts["refused"] > 100
    assert counts["merged"] > 30


@pytest.mark.torture
def test_thousands_of_damaged_inputs_give_an_error_or_the_right_merge(root):
    begin = clock()
    counts, bugs = fuzz(root, range(1000, 1000 + times(12_000)))
    record("malformed inputs of merges: flipped bytes, cuts, moved tensors", counts, clock() - begin)
    assert not bugs, "\n".join(bugs)
