"""The worst input of every parser of foreign files is refused in one line. Unbounded, each would not end."""

from __future__ import annotations

import json
import os
import resource
import struct

import pytest
from light_model import light_model

from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.core.json_files import load_json, read_json
from gemma2.core.limits import JSON_ITEMS, YAML_BYTES, YAML_NODES
from gemma2.core.outputs.manifest import MANIFEST, read_manifest
from gemma2.core.outputs.safetensors_header import read_header
from gemma2.core.yaml_files import place_of, read_documents
from gemma2.posttrain.checks.kinds import check_kinds
from gemma2.posttrain.conversion import gguf
from gemma2.posttrain.data import template_time
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer
from gemma2.posttrain.pipelines.references import parse_condition
from gemma2.posttrain.pipelines.state import recorded_stages
from gemma2.posttrain.schemas import SftConfig

SECONDS = 20  # of computing: what is bounded takes at most six, what is not takes minutes


@pytest.fixture(autouse=True)
def bounded():
    """Ends a test whose input is not bounded, in place of a hang."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + SECONDS, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def levels(line: str, count: int) -> str:
    return "a0: &a0 {k: 1}\n" + "".join(line.format(i=i, j=i - 1) for i in range(1, count))


YAML = {
    "aliases": levels("a{i}: &a{i} [*a{j}, *a{j}]\n", 40),
    "merge keys": levels("a{i}: &a{i} {{<<: [*a{j}, *a{j}, *a{j}]}}\n", 20),
    "an alias in every item": "a: &a [" + "1, " * 2000 + "1]\nb: [" + "*a, " * 2000 + "*a]\n",
    "keys": "".join(f"k{i}: 1\n" for i in range(YAML_NODES)),
    "brackets": "[" * 100_000,
    "levels": "a: " + "[" * 150 + "]" * 150,
    "question marks": "? " * 50_000,
    "itself": "a: &a [*a]\n",
    "itself by merge": "a: &a {<<: *a}\n",
    "size": "a: '" + "x" * YAML_BYTES + "'\n",
    "a long number": "a: " + "1" * 5000 + "\n",
    "a date": "seed: 2024-99-99\n",
    "a tag that does not fit": '!!int "x"\n',
    "a float that does not fit": 'a: !!float "x"\n',
    "a truth that does not fit": 'a: !!bool "x"\n',
    "a time that does not fit": 'a: !!timestamp "x"\n',
    "bytes that do not fit": "a: !!binary é\n",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML[name])
    with pytest.raises(Gemma2Error) as caught:
        read_documents(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert place_of(path, ("a30", 0)).startswith(str(path))


def test_yaml_within_the_bounds_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: &b {x: 1, y: [1, 2]}\nuse: {<<: *b, z: *b}\n" + "".join(f"k{i}: 1\n" for i in range(2000)))
    (found,) = read_documents(path)
    assert found["use"] == {"x": 1, "y": [1, 2], "z": {"x": 1, "y": [1, 2]}} and found["k1999"] == 1


@pytest.mark.parametrize("text", [" " * 200_000, "a" + " " * 200_000, "a <" + " " * 200_000, "< b", "a <", "a b"])
def test_conditions(text):
    with pytest.raises(UsageError, match="is not a comparison") as caught:
        parse_condition(text)
    assert len(str(caught.value)) < 500


def test_conditions_that_are_read():
    assert parse_condition(" a <= b < c ") == ("a", "<=", "b < c")
    assert parse_condition("${x} == 1") == ("${x}", "==", "1")


JSON = {
    "levels": "[" * 200_000,
    "levels of objects": '{"a":' * 200_000,
    "a long number": '{"a": ' + "1" * 5000 + "}",
    "items": "[" + "[]," * (JSON_ITEMS // 2) + "[]]",
    "not UTF-8": b"\xff\xfe{",
}


@pytest.mark.parametrize("name", JSON)
def test_json(name, tmp_path):
    text = JSON[name]
    path = tmp_path / MANIFEST
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=MANIFEST):
        read_json(path)
    with pytest.raises(InputError, match=MANIFEST):
        read_manifest(tmp_path)
    with pytest.raises(ValueError):
        load_json(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("deep", ["[" * 200_000, '{"a":' * 200_000])
def test_deep_json_in_a_model_is_one_line(name, deep, tmp_path):
    model = light_model(tmp_path / "model")
    (model / name).write_text(deep)
    with pytest.raises(InputError, match=str(model)):
        check_kinds(SftConfig(model=model, data="d"), {})
        load_light_tokenizer(model)


def test_deep_json_in_the_state_of_a_pipeline_is_no_state(tmp_path):
    (tmp_path / "pipeline.json").write_text("[" * 200_000)
    assert recorded_stages(tmp_path) == {}


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / MANIFEST)
    for read in (lambda: read_manifest(tmp_path), lambda: read_json(tmp_path / MANIFEST)):
        with pytest.raises(InputError, match="is not a regular file"):
            read()
    with pytest.raises(InputError, match="is not a regular file"):
        read_documents(tmp_path / MANIFEST)
    with pytest.raises(InputError, match="is not a regular file"):
        gguf.read_header(tmp_path / MANIFEST)


def safetensors(path, text: bytes):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def entry(shape: str) -> str:
    return f'{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}'


SAFETENSORS = {
    "names twice": "{" + ",".join(f'"n{i // 2}":0' for i in range(400_000)) + "}",
    "one name": "{" + ",".join('"n":0' for _ in range(400_000)) + "}",
    "dimensions": '{"a":' + entry("[" + "3," * 1_000_000 + "3]") + "}",
    "values": '{"a":' + entry("[" + "[]," * (JSON_ITEMS // 2) + "3]") + "}",
    "levels": '{"a":' * 100_000,
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_headers_of_safetensors(name, tmp_path):
    path = safetensors(tmp_path / "model.safetensors", SAFETENSORS[name].encode())
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        read_header(path)
    assert len(str(caught.value)) < 500


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_file(entries: list[tuple[str, int, bytes]], tensors: bytes = b"", count: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(entries))
    return head + b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in entries) + tensors


ARCHITECTURE = ("general.architecture", 8, text("gemma2"))
SIZES = [ARCHITECTURE, ("gemma2.embedding_length", 4, struct.pack("<I", 16))]
GGUF = {
    "dimensions": gguf_file([], text("a") + struct.pack("<I", 200_000) + struct.pack("<Q", 2**40) * 200_000, 1),
    "arrays in arrays": gguf_file([("a", 9, struct.pack("<IQ", 9, 1) * 5000)]),
    "texts": gguf_file([("a", 9, struct.pack("<IQ", 8, 2**40) + bytes(8) * 100)]),
    "numbers of arrays": gguf_file([("a", 9, struct.pack("<IQ", 9, 2**40) + bytes(12) * 100)]),
    "tensors": gguf_file([], b"", 2**60),
    "no heads": gguf_file([*SIZES, ("gemma2.attention.head_count", 4, bytes(4))]),
    "heads in words": gguf_file([*SIZES, ("gemma2.attention.head_count", 8, text("two"))]),
    "heads left out": gguf_file(SIZES),
}


@pytest.mark.parametrize("name", GGUF)
def test_headers_of_gguf(name, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF[name])
    with pytest.raises(InputError, match=r"model\.gguf is not a readable GGUF file"):
        gguf.read_header(path)


LOOPS = "{%- for a in range(9999) %}{%- for b in range(9999) %}{%- for c in range(9999) %}" + "{%- endfor %}" * 3
TEMPLATES = {
    "loops": LOOPS,
    "size": "x" * 2**21,
    "an error of Python": "{{ 1 + 'a' }}",
    "a division": "{{ 1 / 0 }}",
    "twenty-one loops": "{% for a in [1] %}" * 21 + "{% endfor %}" * 21,
    "a loop that refuses": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name, tmp_path, monkeypatch):
    monkeypatch.setattr(template_time, "TEMPLATE_SECONDS", 0.3)
    model = light_model(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATES[name]}))
    with pytest.raises(InputError):
        ChatFormat(load_light_tokenizer(model))
