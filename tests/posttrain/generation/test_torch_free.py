"""`gemma2 generate --engine openai` imports no torch: 500 MB and seconds that a client of a server has no use for."""

from __future__ import annotations

import json

import pytest
from chat_server import KEY, Server, serving
from processes import finish, start

pytest.importorskip("openai")
HEAVY = ("torch", "transformers", "trl", "datasets", "numba")
SCRIPT = f"""
import json
from gemma2.cli.main import run
for words in map(json.loads, sys.argv[1:]):
    assert run(words) == 0, words
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, (words, heavy)
"""
ARGUMENTS = {"plain": [], "turns": ["--turns", "2", "--n", "2", "--stop", "x y, z", "--min-p", "0.1"]}
ARGUMENTS |= {"dry": ["--dry-run"]}


def test_a_client_of_a_server_imports_no_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    with serving(Server()) as address:
        words = ["generate", "--engine", "openai", "--teacher", "a/model", "--base-url", address, "--json", "--quiet"]
        words += ["--prompts", str(tmp_path / "prompts.jsonl")]
        lines = [[*words, "--out", str(tmp_path / name), *more] for name, more in ARGUMENTS.items()]
        code, out, err = finish(start(SCRIPT, *map(json.dumps, lines)))
    assert (code, err) == (0, "")
    assert out.count("\n}\n") == len(ARGUMENTS)  # a document for each
    assert {name: (tmp_path / name).exists() for name in ARGUMENTS} == {"plain": True, "turns": True, "dry": False}
