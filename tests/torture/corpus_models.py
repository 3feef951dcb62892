"""Malformed models: shards, headers, indexes, directories, meaning."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from corpus import (
    Case,
    both,
    edited,
    entry,
    header,
    header_text,
    keyed,
    linked,
    nothing,
    removed,
    replaced,
    swapped,
    tensors,
    text,
)

MERGE = "merge linear rl-1 rl-2 --out out"
INSPECT = "inspect rl-2"
RL2, BASE = "rl-2/model.safetensors", "base/model.safetensors"
SHARD, INDEX = "rl-1/model-00001-of-00002.safetensors", "rl-1/model.safetensors.index.json"
CONFIG, NORM, EMBED = "rl-2/config.json", "model.norm.weight", "model.embed_tokens.weight"
DAMAGED = "the file is damaged or not safetensors"


def weight_map(**places: object):
    """Places of tensors in the index of rl-1; `...` removes one."""

    def change(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        index["weight_map"] |= {name.replace("__", "."): place for name, place in places.items()}
        index["weight_map"] = {name: place for name, place in index["weight_map"].items() if place is not ...}
        (root / INDEX).write_text(json.dumps(index))

    return change


def in_index(old: str, new: str):
    return swapped(INDEX, old, new)


def shards_exchanged(root: Path) -> None:
    first, second = root / SHARD, root / SHARD.replace("00001-of", "00002-of")
    aside = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(aside)


SHARDS = {
    "an empty file": Case(text(RL2, b""), MERGE, (RL2, "header length 0 does not fit a file of 0 bytes")),
    "seven bytes": Case(text(RL2, b"1234567"), MERGE, (RL2, "file of 7 bytes")),
    "a text file": Case(text(RL2, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), MERGE, (RL2,)),
    "the last byte missing": Case(edited(RL2, lambda data: data[:-1]), MERGE, (RL2, "is truncated")),
    "half of the file": Case(edited(RL2, lambda data: data[: len(data) // 2]), MERGE, (RL2, "is truncated")),
    "the header alone": Case(
        edited(RL2, lambda data: data[: 8 + int.from_bytes(data[:8], "little")]), MERGE, (RL2, "is truncated")
    ),
    "a byte more": Case(edited(RL2, lambda data: data + b"\0"), MERGE, (RL2, "extra bytes at its end")),
    "a zip file": Case(text(RL2, b"PK\3\4" + bytes(200)), MERGE, (RL2, "header length")),
    "a gguf file": Case(text(RL2, b"GGUF" + bytes(200)), MERGE, (RL2, "header length")),
    "a folder": Case(replaced(RL2, Path.mkdir), MERGE, (RL2, "not a regular file")),
    "a pipe": Case(replaced(RL2, os.mkfifo), MERGE, (RL2, "not a regular file")),
    "a socket's place, a device": Case(linked(RL2, "/dev/zero"), MERGE, (RL2, "not a regular file")),
    "a link to nothing": Case(linked(RL2, "gone.safetensors"), MERGE, ("rl-2", "model.safetensors")),
    "a link to itself": Case(linked(RL2, "model.safetensors"), MERGE, ("rl-2", "model.safetensors")),
    "a missing shard": Case(removed(SHARD), MERGE, (SHARD, "No such file")),
    "two shards exchanged": Case(shards_exchanged, MERGE, ("rl-1", "in the index but not in")),
    "a truncated shard": Case(edited(SHARD, lambda data: data[:-2]), MERGE, (SHARD, "is truncated")),
    "a truncated shard, shown": Case(edited(SHARD, lambda data: data[:-2]), "inspect rl-1", (SHARD, "is truncated")),
    "a truncated file of a policy, trained": Case(
        edited(BASE, lambda data: data[:-4]),
        "sft --model base --data chats.jsonl --out out",
        (BASE, "is truncated"),
    ),
}

HEADERS = {
    "a length of zero": Case(edited(RL2, lambda data: bytes(8) + data[8:]), MERGE, (RL2, "header length 0")),
    "a length of 2^63": Case(
        edited(RL2, lambda data: (2**63).to_bytes(8, "little") + data[8:]), MERGE, (RL2, "header length 9223372036")
    ),
    "a length one short": Case(
        edited(RL2, lambda data: (int.from_bytes(data[:8], "little") - 1).to_bytes(8, "little") + data[8:]),
        MERGE,
        (RL2, "not JSON"),
    ),
    "a length one long": Case(
        edited(RL2, lambda data: (int.from_bytes(data[:8], "little") + 1).to_bytes(8, "little") + data[8:]),
        MERGE,
        (RL2, DAMAGED),
    ),
    "leading blanks": Case(header_text(RL2, lambda data: b"  " + data), MERGE, (RL2, "does not begin with {")),
    "a leading line end": Case(header_text(RL2, lambda data: b"\n" + data), INSPECT, (RL2, "does not begin with {")),
    "a byte order mark": Case(
        header_text(RL2, lambda data: b"\xef\xbb\xbf" + data), MERGE, (RL2, "does not begin with {")
    ),
    "UTF-16": Case(header_text(RL2, lambda data: data.decode().encode("utf-16-le")), MERGE, (RL2, "not JSON")),
    "bytes that are not UTF-8": Case(header_text(RL2, lambda data: data[:2] + b"\xff" + data[2:]), MERGE, (RL2,)),
    "text behind the object": Case(header_text(RL2, lambda data: data + b" {}"), MERGE, (RL2, "not JSON")),
    "NUL as padding": Case(header_text(RL2, lambda data: data + b"\0\0"), MERGE, (RL2, "not JSON")),
    "a list": Case(header_text(RL2, lambda data: b"[" + data + b"]"), MERGE, (RL2, "does not begin with {")),
    "an empty object": Case(both(text(RL2, (2).to_bytes(8, "little") + b"{}")), MERGE, ("rl-2", EMBED)),
    "deep": Case(
        header_text(RL2, lambda data: b'{"a":' + b"[" * 50_000), MERGE, (RL2, "the header is not JSON (RecursionError)")
    ),
    "endless number": Case(
        header_text(RL2, lambda data: data.replace(b"[8]", b"[" + b"8" * 5000 + b"]", 1)), MERGE, (RL2, "not JSON")
    ),
    "a tensor twice": Case(
        header_text(RL2, lambda data: data.replace(b"{", b'{"model.norm.weight": 1,', 1)), MERGE, (RL2, NORM, "twice")
    ),
    "a key of an entry twice": Case(
        header_text(RL2, lambda data: data.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1)),
        MERGE,
        (RL2, "names dtype twice"),
    ),
    "__metadata__ that is a list": Case(
        header(RL2, lambda h: h | {"__metadata__": ["pt"]}), MERGE, (RL2, "__metadata__")
    ),
    "__metadata__ that is a text": Case(
        header(RL2, lambda h: h | {"__metadata__": "pt"}), INSPECT, (RL2, "__metadata__")
    ),
    "__metadata__ with a number": Case(
        header(RL2, lambda h: h | {"__metadata__": {"step": 5}}), MERGE, (RL2, "__metadata__")
    ),
    "__metadata__ with a map": Case(
        header(RL2, lambda h: h | {"__metadata__": {"format": {"x": "pt"}}}), MERGE, (RL2, "__metadata__")
    ),
    "__metadata__ that is null": Case(header(RL2, lambda h: h | {"__metadata__": None}), MERGE, (RL2, "__metadata__")),
    "an entry that is null": Case(header(RL2, lambda h: h | {NORM: None}), MERGE, (RL2, NORM, "dtype, shape and")),
    "an entry without a dtype": Case(entry(RL2, NORM, dtype=...), MERGE, (RL2, NORM, "dtype, shape and")),
    "an entry with another key": Case(entry(RL2, NORM, stride=[1]), MERGE, (RL2, NORM, "dtype, shape and")),
    "an unknown dtype": Case(entry(RL2, NORM, dtype="F17"), MERGE, (RL2, NORM, "unknown dtype F17")),
    "a dtype that is a number": Case(entry(RL2, NORM, dtype=5), MERGE, (RL2, NORM, "unknown dtype 5")),
    "a dtype in lower case": Case(entry(RL2, NORM, dtype="f16"), MERGE, (RL2, NORM, "unknown dtype f16")),
    "a wider dtype": Case(entry(RL2, NORM, dtype="F32"), MERGE, (RL2, NORM, "32 bytes, but its offsets span 16")),
    "integers": Case(entry(RL2, NORM, dtype="I16"), MERGE, ("rl-2", NORM, "I16")),
    "a negative shape": Case(entry(RL2, NORM, shape=[-8]), MERGE, (RL2, NORM, "malformed shape")),
    "a shape with a fraction": Case(entry(RL2, NORM, shape=[8.0]), MERGE, (RL2, NORM, "malformed shape")),
    "a shape with a truth value": Case(entry(RL2, NORM, shape=[True, 8]), MERGE, (RL2, NORM, "malformed shape")),
    "a shape that is a text": Case(entry(RL2, NORM, shape="8"), MERGE, (RL2, NORM, "malformed shape")),
    "a shape that overflows": Case(entry(RL2, NORM, shape=[2**40, 2**40]), MERGE, (RL2, NORM, "offsets span")),
    "a shape of other elements": Case(entry(RL2, NORM, shape=[9]), MERGE, (RL2, NORM, "offsets span 16")),
    "a thousand dimensions": Case(entry(RL2, NORM, shape=[8] + [1] * 1000), MERGE, (RL2, NORM, "dimensions")),
    "offsets of one number": Case(entry(RL2, NORM, data_offsets=[0]), MERGE, (RL2, NORM, "data_offsets")),
    "negative offsets": Case(entry(RL2, NORM, data_offsets=[-16, 0]), MERGE, (RL2, NORM, "data_offsets")),
    "offsets in reverse": Case(entry(RL2, NORM, data_offsets=[16, 0]), MERGE, (RL2, NORM, "offsets span -16")),
    "offsets of another tensor": Case(entry(RL2, NORM, data_offsets=[0, 16]), MERGE, (RL2, "overlaps")),
    "offsets behind the end": Case(
        entry(RL2, NORM, data_offsets=[10**9, 10**9 + 16]), MERGE, (RL2, NORM, "leaves a hole")
    ),
    "an entry less": Case(header(RL2, lambda h: h.pop(NORM) and None), MERGE, (RL2, "extra bytes")),
    "a name with thousands of digits": Case(
        header_text(RL2, lambda data: data.replace(NORM.encode(), b"model." + b"9" * 5000, 1)), MERGE, ("rl-2", "999")
    ),
    "a name with half a character": Case(
        header_text(RL2, lambda data: data.replace(NORM.encode(), rb"model.\ud800", 1)), MERGE, (RL2, "not Unicode")
    ),
}

INDEXES = {
    "no JSON": Case(text(INDEX, "{"), MERGE, (INDEX, "not readable JSON")),
    "empty": Case(text(INDEX, ""), MERGE, (INDEX, "not readable JSON")),
    "a list": Case(text(INDEX, "[]"), MERGE, (INDEX, "not a JSON object")),
    "no weight_map": Case(keyed(INDEX, weight_map=...), MERGE, (INDEX, "no weight_map")),
    "an empty weight_map": Case(keyed(INDEX, weight_map={}), MERGE, (INDEX, "no weight_map")),
    "a weight_map that is a list": Case(keyed(INDEX, weight_map=["a"]), MERGE, (INDEX, "no weight_map")),
    "a key of the weight_map twice": Case(
        in_index(f'"{EMBED}"', f'"{EMBED}": "model-00002-of-00002.safetensors", "{EMBED}"'),
        MERGE,
        (INDEX, EMBED, "twice"),
    ),
    "two weight_maps": Case(in_index("{", '{"weight_map": {}, '), MERGE, (INDEX, "weight_map", "twice")),
    "a place that is a number": Case(weight_map(model__norm__weight=5), MERGE, (INDEX, NORM, "not a file name")),
    "a place out of the folder": Case(
        weight_map(model__norm__weight="../base/model.safetensors"), MERGE, (INDEX, NORM, "not a file name")
    ),
    "an absolute place": Case(weight_map(model__norm__weight="/etc/passwd"), MERGE, (INDEX, "/etc/passwd")),
    "a place with a NUL": Case(weight_map(model__norm__weight="a\0b"), MERGE, (INDEX, "not a file name")),
    "a place in the wrong shard": Case(
        weight_map(model__norm__weight="model-00001-of-00002.safetensors"), MERGE, ("rl-1", NORM)
    ),
    "a place in a shard that is missing": Case(
        weight_map(model__norm__weight="model-00003-of-00002.safetensors"), MERGE, ("rl-1", NORM, "not in the index")
    ),
    "a tensor that no shard holds": Case(
        weight_map(model__x__weight="model-00002-of-00002.safetensors"), MERGE, ("rl-1", "model.x.weight", "not in")
    ),
    "a tensor that is not named": Case(weight_map(model__norm__weight=...), MERGE, ("rl-1", NORM, "not in the index")),
    "a pipe": Case(replaced(INDEX, os.mkfifo), MERGE, ("rl-1",)),
    "next to a whole file": Case(
        linked("rl-1/model.safetensors", "../base/model.safetensors"), MERGE, ("rl-1", "both")
    ),
    "wrong, trained": Case(
        in_index(f'"{EMBED}"', f'"{EMBED}": "model-00002-of-00002.safetensors", "{EMBED}"'),
        "sft --model rl-1 --data chats.jsonl --out out",
        (INDEX, EMBED, "twice"),
    ),
    "a tensor that no shard holds, trained": Case(
        weight_map(model__x__weight="model-00002-of-00002.safetensors"),
        "sft --model rl-1 --data chats.jsonl --out out",
        ("rl-1", "model.x.weight"),
    ),
}

DIRECTORIES = {
    "missing": Case(nothing, "merge linear gone rl-2 --out out", ("gone",)),
    "a file": Case(nothing, "merge linear recipe.yaml rl-2 --out out", ("recipe.yaml", "not a directory")),
    "empty": Case(lambda root: (root / "empty").mkdir(), "merge linear empty rl-2 --out out", ("empty", "neither")),
    "no config.json": Case(removed(CONFIG), MERGE, ("rl-2", "no config.json")),
    "no weights": Case(removed(RL2), MERGE, ("rl-2", "neither")),
    "no weights, trained": Case(
        removed(BASE), "sft --model base --data chats.jsonl --out out", ("base", "safetensors")
    ),
    "pickled weights only": Case(
        both(removed(RL2), text("rl-2/pytorch_model.bin", b"\x80\x04cposix\nsystem\n")), MERGE, ("rl-2", "pickled")
    ),
    "GGUF weights only": Case(both(removed(RL2), text("rl-2/x.gguf", b"GGUF")), MERGE, ("rl-2", "GGUF")),
    "a config that is no JSON": Case(text(CONFIG, "{'a': 1}"), MERGE, (CONFIG, "not readable JSON")),
    "a config with a key twice": Case(
        swapped(CONFIG, '"hidden_size"', '"hidden_size": 16, "hidden_size"'), MERGE, (CONFIG, "hidden_size", "twice")
    ),
    "a config with a key twice, trained": Case(
        swapped("base/config.json", '"hidden_size"', '"hidden_size": 16, "hidden_size"'),
        "sft --model base --data chats.jsonl --out out",
        ("base/config.json", "hidden_size", "twice"),
    ),
    "a config that is a list": Case(text(CONFIG, "[]"), MERGE, (CONFIG, "not a JSON object")),
    "a config that is empty": Case(text(CONFIG, ""), MERGE, (CONFIG, "not readable JSON")),
    "a config in Latin-1": Case(edited(CONFIG, lambda data: data[:-1] + b', "a": "\xe9"}'), MERGE, (CONFIG, "JSON")),
    "a deep config": Case(text(CONFIG, '{"a": ' + "[" * 100_000), MERGE, (CONFIG, "JSON")),
    "a deep config, trained": Case(
        text("base/config.json", '{"a": ' + "[" * 100_000),
        "sft --model base --data chats.jsonl --out out",
        ("base/config.json", "JSON"),
    ),
    "a config that is a pipe": Case(replaced(CONFIG, os.mkfifo), MERGE, ("rl-2", "config.json")),
    "a tokenizer that is no JSON": Case(text("rl-2/tokenizer.json", "{"), MERGE, ("rl-2/tokenizer.json",)),
    "a tokenizer that is no JSON, trained": Case(
        text("base/tokenizer.json", "{"), "sft --model base --data chats.jsonl --out out", ("base",)
    ),
    "no tokenizer, trained": Case(
        both(removed("base/tokenizer.json"), removed("base/tokenizer_config.json")),
        "sft --model base --data chats.jsonl --out out",
        ("base", "tokenizer"),
    ),
    "an unfinished output": Case(keyed("rl-2/gemma2.json", status="running"), MERGE, ("rl-2", "unfinished")),
    "a companion that leads out": Case(
        linked("rl-1/generation_config.json", "../base/tokenizer_config.json"), MERGE, ("rl-1", "link")
    ),
}

MEANING = {
    "no width": Case(keyed(CONFIG, hidden_size=...), MERGE, (CONFIG, "hidden_size is 2304 by default")),
    "the type of another family": Case(
        keyed(CONFIG, model_type="gemma"), MERGE, ("rl-2/config.json", "model_type gemma")
    ),
    "no architecture": Case(keyed(CONFIG, architectures=...), MERGE, ("rl-2/config.json", "one architecture")),
    "two architectures": Case(keyed(CONFIG, architectures=["A", "B"]), MERGE, ("rl-2/config.json", "one architecture")),
    "own code": Case(keyed(CONFIG, auto_map={"AutoModel": "x.Y"}), MERGE, (CONFIG, "auto_map")),
    "own code, trained": Case(
        keyed("base/config.json", auto_map={"AutoModel": "x.Y"}),
        "sft --model base --data chats.jsonl --out out",
        ("base/config.json", "auto_map"),
    ),
    "a kernel of others": Case(
        keyed(CONFIG, _attn_implementation="org/kernel"), MERGE, (CONFIG, "org/kernel", "_attn_implementation")
    ),
    "quantised": Case(keyed(CONFIG, quantization_config={"bits": 4}), MERGE, ("rl-2", "quantised")),
    "another width than the tensors": Case(
        keyed("base/config.json", hidden_size=16),
        "sft --model base --data chats.jsonl --out out",
        ("base",),
    ),
    "another width than the tensors, merged": Case(
        both(keyed(CONFIG, hidden_size=16), keyed("rl-1/config.json", hidden_size=16)), MERGE, ("hidden_size", "16")
    ),
    "another vocabulary than the embedding, merged": Case(
        both(keyed(CONFIG, vocab_size=100), keyed("rl-1/config.json", vocab_size=100)), MERGE, ("vocab_size", "100")
    ),
    "more layers than the tensors, merged": Case(
        both(keyed(CONFIG, num_hidden_layers=3), keyed("rl-1/config.json", num_hidden_layers=3)),
        MERGE,
        ("num_hidden_layers", "3"),
    ),
    "fewer layers than the tensors": Case(
        keyed("base/config.json", num_hidden_layers=1),
        "sft --model base --data chats.jsonl --out out",
        ("base",),
    ),
    "a vocabulary that is a text": Case(
        keyed("base/config.json", vocab_size="many"),
        "sft --model base --data chats.jsonl --out out",
        ("base", "vocab_size"),
    ),
    "a negative width": Case(
        keyed("base/config.json", hidden_size=-8), "sft --model base --data chats.jsonl --out out", ("base",)
    ),
    "a tokenizer with more tokens than the embedding has rows": Case(
        both(
            keyed("base/config.json", vocab_size=50),
            tensors("base", lambda a: a.update({EMBED: a[EMBED][:50]})),
        ),
        "sft --model base --data chats.jsonl --out out",
        ("base", "vocab_size of 50"),
    ),
    "architectures that are a number": Case(
        keyed("base/config.json", architectures=5), "sft --model base --data chats.jsonl --out out", ("base",)
    ),
    "a tensor less": Case(
        tensors("base", lambda a: a.pop(NORM)), "sft --model base --data chats.jsonl --out out", (NORM,)
    ),
    "a tensor more": Case(
        tensors("base", lambda a: a.update(x=np.ones(2))),
        "sft --model base --data chats.jsonl --out out",
        ("base", "x"),
    ),
    "NaN": Case(tensors("rl-2", lambda a: a[NORM].__setitem__(3, np.nan)), MERGE, ("rl-2", NORM, "nan", "element 3")),
    "infinity": Case(tensors("rl-2", lambda a: a[NORM].__setitem__(0, np.inf)), MERGE, ("rl-2", NORM, "inf")),
    "NaN, trained": Case(
        tensors("base", lambda a: a[NORM].__setitem__(3, np.nan)),
        "sft --model base --data chats.jsonl --max-steps 1 --out out",
        ("base", NORM),
    ),
    "zeros alone, trained": Case(
        tensors("base", lambda a: a.update({k: v * 0 for k, v in a.items()})),
        "sft --model base --data chats.jsonl --max-steps 1 --out out",
        ("base", "0"),
    ),
    "a reward model as a policy": Case(
        nothing, "sft --model rm --data chats.jsonl --out out", ("--model rm", "reward model")
    ),
    "a policy as a reward model": Case(
        nothing,
        "rlhf --policy base --reward rl-1 --prompts prompts.jsonl --out out",
        ("--reward rl-1", "a policy"),
    ),
    "a reward model of two outputs": Case(
        keyed("rm/config.json", num_labels=2),
        "reward score rm --data pairs.jsonl --out out",
        ("rm",),
    ),
    "a tokenizer of another size": Case(
        swapped("rl-1/tokenizer.json", '"~"', '"\\u00e9"'),
        "eval --model rl-1 --sft base --reward rm --prompts prompts.jsonl",
        ("rl-1", "tokenizer"),
    ),
}
