"""Malformed data: rows to learn from, prompts, pairs, tables, packed files; and chat templates."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

from corpus import Case, Damage, edited, keyed, linked, nothing, replaced, text

CHATS, PAIRS, PROMPTS, TABLE = "chats.jsonl", "pairs.jsonl", "prompts.jsonl", "table.csv"
SFT = "sft --model base --data chats.jsonl --out out"
CSV = "sft --model base --data table.csv --out out"
REWARD = "reward --model base --data pairs.jsonl --out out"
GENERATE = "generate --teacher base --prompts prompts.jsonl --out out"
RLHF = "rlhf --policy base --reward rm --prompts prompts.jsonl --out out"
FILTER = "filter chats.jsonl --out out"


def line(name: str, number: int, content: str | bytes) -> Damage:
    """One line of a file exchanged for another."""

    def change(data: bytes) -> bytes:
        lines = data.split(b"\n")
        lines[number - 1] = content.encode() if isinstance(content, str) else content
        return b"\n".join(lines)

    return edited(name, change)


def row(name: str, number: int, **keys: object) -> Damage:
    """Keys of one row set; `...` removes one."""

    def change(data: bytes) -> bytes:
        lines = data.split(b"\n")
        found = json.loads(lines[number - 1]) | keys
        lines[number - 1] = json.dumps({k: v for k, v in found.items() if v is not ...}).encode()
        return b"\n".join(lines)

    return edited(name, change)


def messages(*turns: object, **keys: object) -> Damage:
    return line(CHATS, 1, json.dumps({"messages": list(turns)} | keys)) if keys else _all(list(turns))


def _all(turns: list[object]) -> Damage:
    return text(CHATS, json.dumps({"messages": turns}) + "\n")


def turn(role: object, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


U, A = turn("user", "Hi"), turn("assistant", "Ho")

ROWS = {
    "a missing file": Case(nothing, "sft --model base --data gone.jsonl --out out", ("gone.jsonl",)),
    "an empty file": Case(text(CHATS, ""), SFT, (CHATS, "no rows")),
    "blank lines alone": Case(text(CHATS, "\n\n  \n"), SFT, (CHATS, "no rows")),
    "a line cut off": Case(line(CHATS, 3, '{"prompt": "a", "compl'), SFT, (f"{CHATS}:3",)),
    "a last line cut off": Case(edited(CHATS, lambda data: data[:-5]), SFT, (f"{CHATS}:6",)),
    "a line that is a list": Case(line(CHATS, 2, "[1]"), SFT, (f"{CHATS}:2",)),
    "a line that is a number": Case(line(CHATS, 2, "5"), SFT, (f"{CHATS}:2",)),
    "two objects on a line": Case(line(CHATS, 2, '{"a": 1} {"b": 2}'), SFT, (f"{CHATS}:2",)),
    "single quotes": Case(line(CHATS, 2, "{'prompt': 'a'}"), SFT, (f"{CHATS}:2",)),
    "NaN": Case(line(CHATS, 2, '{"prompt": NaN, "completion": "x"}'), SFT, (f"{CHATS}:2",)),
    "endless number": Case(line(CHATS, 2, '{"prompt": ' + "9" * 5000 + "}"), SFT, (f"{CHATS}:2",)),
    "deep": Case(line(CHATS, 2, "[" * 100_000), SFT, (f"{CHATS}:2",)),
    "a key twice": Case(
        line(CHATS, 2, '{"prompt": "a", "prompt": "b", "completion": "c"}'), SFT, (f"{CHATS}:2", "prompt")
    ),
    "Latin-1": Case(line(CHATS, 2, b'{"prompt": "\xe9", "completion": "x"}'), SFT, (CHATS, "UTF-8")),
    "UTF-16": Case(edited(CHATS, lambda data: data.decode().encode("utf-16")), SFT, (CHATS,)),
    "half a character": Case(line(CHATS, 2, '{"prompt": "\\ud800", "completion": "x"}'), SFT, (f"{CHATS}:2",)),
    "NUL bytes": Case(line(CHATS, 2, b"\0\0\0\0"), SFT, (f"{CHATS}:2",)),
    "no answer": Case(row(CHATS, 2, completion=...), SFT, (f"{CHATS}:2",)),
    "an empty answer": Case(row(CHATS, 2, completion=""), SFT, (f"{CHATS}:2",)),
    "an answer that is a number": Case(row(CHATS, 2, completion=5), SFT, (f"{CHATS}:2",)),
    "an answer that is null": Case(row(CHATS, 2, completion=None), SFT, (f"{CHATS}:2",)),
    "an answer that is a list of numbers": Case(row(CHATS, 2, completion=[1]), SFT, (f"{CHATS}:2",)),
    "a prompt that is empty": Case(row(CHATS, 2, prompt=""), SFT, (f"{CHATS}:2",)),
    "misspelt columns": Case(text(CHATS, '{"promt": "a", "completon": "b"}\n'), SFT, (CHATS, "promt")),
    "messages that are a text": Case(text(CHATS, '{"messages": "Hi"}\n'), SFT, (f"{CHATS}:1", "messages")),
    "messages that are empty": Case(messages(), SFT, (f"{CHATS}:1",)),
    "a message that is null": Case(messages(None, A), SFT, (f"{CHATS}:1",)),
    "an unknown role": Case(messages(turn("wizard", "Hi"), A), SFT, (f"{CHATS}:1", "wizard")),
    "a role that is a number": Case(messages(turn(1, "Hi"), A), SFT, (f"{CHATS}:1",)),
    "content that is a number": Case(messages(turn("user", 5), A), SFT, (f"{CHATS}:1",)),
    "an image": Case(
        messages(turn("user", [{"type": "image_url", "image_url": "x"}]), A), SFT, (f"{CHATS}:1", "image")
    ),
    "two user turns": Case(messages(U, U, A), SFT, (f"{CHATS}:1",)),
    "no answer at the end": Case(messages(U, A, U), SFT, (f"{CHATS}:1",)),
    "a tool": Case(messages(U, turn("tool", "x"), A), SFT, (f"{CHATS}:1", "tool")),
    "control characters in a column": Case(
        edited(CHATS, lambda data: data.replace(b'"prompt"', b'"\\u001b[2J"')), SFT, (CHATS, "\\x1b")
    ),
    "a folder without data": Case(
        lambda root: (root / "nothing").mkdir(), "sft --model base --data nothing --out out", ("nothing",)
    ),
    "a pipe": Case(replaced(CHATS, os.mkfifo), SFT, (CHATS,)),
    "a device": Case(linked(CHATS, "/dev/zero"), SFT, (CHATS,)),
    "a link to nothing": Case(linked(CHATS, "gone"), SFT, (CHATS,)),
    "an unknown format": Case(text("rows.xyz", "a"), "sft --model base --data rows.xyz --out out", ("rows.xyz",)),
    "every row too long": Case(nothing, f"{SFT} --max-length 8", (CHATS, "--max-length")),
    "filtered: a line cut off": Case(line(CHATS, 3, '{"prompt": "a", "compl'), FILTER, (f"{CHATS}:3",)),
    "filtered: Latin-1": Case(line(CHATS, 2, b'{"prompt": "\xe9", "completion": "x"}'), FILTER, (CHATS, "UTF-8")),
    "converted: no answer": Case(
        row(CHATS, 2, completion=...), "data convert chats.jsonl --to conversations --out rows.jsonl", (f"{CHATS}:2",)
    ),
    "a sum of weights for one data set": Case(nothing, f"{SFT} --weights 1,2", ("weights",), 2),
    "pairs: no rejected side": Case(row(PAIRS, 2, rejected=...), REWARD, (f"{PAIRS}:2", "rejected")),
    "pairs: a side that is a number": Case(row(PAIRS, 2, chosen=5), REWARD, (f"{PAIRS}:2",)),
    "pairs: other prompts": Case(
        row(PAIRS, 2, prompt=..., chosen=[U, A], rejected=[turn("user", "Other"), A]), REWARD, (f"{PAIRS}:2",)
    ),
    "pairs: conversations": Case(nothing, "reward --model base --data chats.jsonl --out out", (CHATS,)),
    "pairs in place of conversations": Case(nothing, "sft --model base --data pairs.jsonl --out out", (PAIRS,)),
    "pairs: scored without a model": Case(
        nothing, "reward score base --data pairs.jsonl --out out", ("base", "a policy")
    ),
    "prompts: a number": Case(row(PROMPTS, 2, prompt=5), GENERATE, (f"{PROMPTS}:2",)),
    "prompts: null": Case(row(PROMPTS, 2, prompt=None), RLHF, (f"{PROMPTS}:2",)),
    "prompts: another column": Case(text(PROMPTS, '{"x": "a"}\n'), RLHF, (PROMPTS,)),
    "prompts: an answer at the end": Case(
        text(PROMPTS, json.dumps({"messages": [U, A]}) + "\n"), RLHF, (f"{PROMPTS}:1",)
    ),
    "prompts: empty, evaluated": Case(
        text(PROMPTS, ""), "eval --model rl-1 --sft base --reward rm --prompts prompts.jsonl", (PROMPTS, "no rows")
    ),
    "prompts: a missing file, warp": Case(
        nothing, "warp --sft base --reward rm --prompts gone.jsonl --heldout prompts.jsonl --out out", ("gone",)
    ),
    "prompts: cut off, distilled": Case(
        line(PROMPTS, 2, "{"),
        "distill --model base --teacher rl-1 --prompts prompts.jsonl --out out",
        (f"{PROMPTS}:2",),
    ),
    "prompts: empty, pareto": Case(
        text(PROMPTS, ""),
        "pareto --policies rl-1 --sft base --reward rm --prompts prompts.jsonl --out out",
        (PROMPTS, "no rows"),
    ),
}

TABLES = {
    "a column twice": Case(edited(TABLE, lambda data: b"prompt," + data), CSV, (TABLE, "prompt")),
    "more fields than columns": Case(line(TABLE, 3, "a,b,c"), CSV, (f"{TABLE}:3",)),
    "fewer fields than columns": Case(line(TABLE, 3, "a"), CSV, (f"{TABLE}:3",)),
    "an open quote": Case(line(TABLE, 3, '"a,b'), CSV, (TABLE,)),
    "no header": Case(edited(TABLE, lambda data: data.split(b"\n", 1)[1]), CSV, (TABLE,)),
    "the header alone": Case(text(TABLE, "prompt,completion\n"), CSV, (TABLE, "no rows")),
    "UTF-16": Case(edited(TABLE, lambda data: data.decode().encode("utf-16")), CSV, (TABLE,)),
    "Latin-1": Case(line(TABLE, 3, b"caf\xe9,b"), CSV, (TABLE, "UTF-8")),
    "parquet that is not": Case(
        text("rows.parquet", "PAR1 but not"), "sft --model base --data rows.parquet --out out", ("rows.parquet",)
    ),
    "parquet cut off": Case(
        lambda root: (root / "rows.parquet").write_bytes(parquet()[:-20]),
        "sft --model base --data rows.parquet --out out",
        ("rows.parquet",),
    ),
    "parquet with a broken footer": Case(
        lambda root: (root / "rows.parquet").write_bytes(parquet()[:-30] + b"\xff" * 22 + parquet()[-8:]),
        "sft --model base --data rows.parquet --out out",
        ("rows.parquet",),
    ),
    "gzip that is not": Case(
        text("rows.jsonl.gz", "{}"), "sft --model base --data rows.jsonl.gz --out out", ("rows.jsonl.gz",)
    ),
    "gzip cut off": Case(
        lambda root: (root / "rows.jsonl.gz").write_bytes(gzip.compress((root / CHATS).read_bytes())[:-12]),
        "sft --model base --data rows.jsonl.gz --out out",
        ("rows.jsonl.gz",),
    ),
    "gzip with a flipped byte": Case(
        lambda root: (root / "rows.jsonl.gz").write_bytes(flipped(gzip.compress((root / CHATS).read_bytes()), -6)),
        "sft --model base --data rows.jsonl.gz --out out",
        ("rows.jsonl.gz",),
    ),
    "zst that is not": Case(
        text("rows.jsonl.zst", "{}"), "sft --model base --data rows.jsonl.zst --out out", ("rows.jsonl.zst",)
    ),
    "a JSON list cut off": Case(
        text("rows.json", '[{"prompt": "a", "completion": "b"},'),
        "sft --model base --data rows.json --out out",
        ("rows.json",),
    ),
}


def parquet() -> bytes:
    """A good file of two columns."""
    import io

    import pyarrow
    from pyarrow import parquet as files

    sink = io.BytesIO()
    files.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), sink)
    return sink.getvalue()


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 0x10
    return bytes(changed)


def template(content: str) -> Callable[[Path], None]:
    return text("base/chat_template.jinja", content)


TEMPLATES = {
    "a block left open": Case(template("{% for m in messages %}{{ m.content }}"), SFT, ("base", "template")),
    "an unknown filter": Case(template("{{ messages | shout }}"), SFT, ("base", "template")),
    "an unknown name": Case(template("{{ nobody.knows }}"), SFT, ("base", "template")),
    "an error of its own": Case(template("{{ raise_exception('no such turn') }}"), SFT, ("base", "no such turn")),
    "a loop that does not end": Case(
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), SFT, ("base",)
    ),
    "recursion": Case(template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), SFT, ("base", "template")),
    "Python's inside": Case(
        template("{{ messages.__class__.__mro__[1].__subclasses__() }}"), SFT, ("base", "template")
    ),
    "empty": Case(template(""), SFT, ("base", "template")),
    "a division by zero": Case(template("{{ 1 // 0 }}"), SFT, ("base", "template")),
    "too long": Case(template("x" * 2_000_000), SFT, ("base", "template")),
    "a pipe": Case(replaced("base/chat_template.jinja", os.mkfifo), SFT, ("base",)),
    "a number": Case(keyed("base/tokenizer_config.json", chat_template=5), SFT, ("base",)),
}
