"""Every way in which a file can be malformed is refused by our own check, with file, key and cause; good files pass."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import entries, safetensors_bytes
from safetensors import deserialize

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import encode_header, read_header

GOOD = safetensors_bytes(entries({"a": np.zeros((2, 3)), "b": np.ones(4)}, "F32"))


def with_header(header: object, data: bytes = bytes(40)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(10,), begin=0, end=40):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HALVES = {"a": entry(shape=(5,), end=20), "b": entry(shape=(5,), begin=20)}
MALFORMED = {
    "empty": (b"", "header length 0 does not fit a file of 0 bytes"),
    "short": (b"\x10\x00", "does not fit a file of 2 bytes"),
    "length beyond the file": ((1 << 20).to_bytes(8, "little") + b"{}", "header length 1048576 does not fit"),
    "no JSON": (with_header(b"{not json"), "the header is not JSON"),
    "no UTF-8": (with_header(b"{\xff\xfe}"), "the header is not JSON"),
    "deep nesting": (with_header(b'{"a":' + b"[" * 100_000), "the header is not JSON"),
    "a list": (with_header([]), "the header does not begin with {"),
    "leading blanks": (with_header(b"  {}"), "the header does not begin with {"),
    "UTF-16": (with_header("{}".encode("utf-16-le")), "the header is not JSON"),
    "metadata that are a list": (with_header({"__metadata__": ["pt"]}), "its __metadata__ does not map texts to texts"),
    "metadata with a number": (with_header({"__metadata__": {"a": 1}}), "its __metadata__ does not map texts to texts"),
    "a key twice": (with_header(b'{"a":' + json.dumps(entry()).encode() + b',"a":{}}'), "the header names a twice"),
    "a missing field": (with_header({"a": {"dtype": "F32"}}), "entry of a does not have exactly dtype"),
    "an unknown dtype": (with_header({"a": entry("F128")}), "a has the unknown dtype F128"),
    "a dtype that is not a text": (with_header({"a": entry(["F32"])}), "a has the unknown dtype"),
    "a negative shape": (with_header({"a": entry(shape=(-10,))}), "a has a malformed shape"),
    "a boolean in a shape": (with_header({"a": entry(shape=(True, 10))}), "a has a malformed shape"),
    "three offsets": (with_header({"a": entry() | {"data_offsets": [0, 40, 80]}}), "malformed shape or data_offsets"),
    "shape and size disagree": (
        with_header({"a": entry(shape=(9,))}),
        "a is F32 [9], 36 bytes, but its offsets span 40",
    ),
    "a huge shape": (with_header({"a": entry(shape=(2**62, 8))}), "but its offsets span 40"),
    "an overlap": (with_header(HALVES | {"b": entry(shape=(5,), begin=16, end=36)}), "b overlaps the tensor before it"),
    "a hole": (with_header(HALVES | {"b": entry(shape=(4,), begin=24)}), "b leaves a hole before it"),
    "truncated data": (GOOD[:-1], "the file is truncated"),
    "extra data": (GOOD + b"\0", "the file has extra bytes at its end"),
    "control characters": (with_header({"a\x1b[2J": entry("F128")}), "a\\x1b[2J has the unknown dtype"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_with_file_and_cause(tmp_path, name):
    data, message = MALFORMED[name]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_header(tmp_path / "model.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "model.safetensors"))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is not a regular file"):
        read_header(tmp_path / "model.safetensors")


def test_a_good_file_passes_with_its_offsets(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    tensors = read_header(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.shape, t.count, t.nbytes) for name, t in tensors.items()} == {
        "a": ("F32", (2, 3), 6, 24),
        "b": ("F32", (4,), 4, 16),
    }
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data[tensors["b"].offset :] == np.ones(4, np.float32).tobytes()


def test_our_header_is_read_by_the_safetensors_library_and_ends_on_a_page():
    header, offsets = encode_header({"b": ("BF16", (2, 2)), "a": ("F32", ())})
    assert len(header) % 4096 == 0
    assert offsets == {"b": len(header), "a": len(header) + 8}
    found = {name: (e["dtype"], e["shape"], bytes(e["data"])) for name, e in deserialize(header + b"12345678abcd")}
    assert found == {"b": ("BF16", [2, 2], b"12345678"), "a": ("F32", [], b"abcd")}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(GOOD) - 41), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_is_refused_or_leaves_a_valid_file(tmp_path, position, bit):
    broken = bytearray(GOOD)
    broken[position] ^= 1 << bit
    path = tmp_path / "model.safetensors"
    path.write_bytes(broken)
    try:
        tensors = read_header(path)
    except InputError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) == 40
