"""`gemma2 generate --engine openai` imports no torch: 500 MB and seconds that a client of a server has no use for."""

from __future__ import annotations

import json

import pytest
from chat_server import KEY, Server, serving
from processes import finish, start

pytest.importorskip("openai")
HEAVY = ("torch", "transformers", "trl", "datasets", "numba")
SCRIPT = f"""
from gemma2.cli.main import run
code = run(sys.argv[1:])
sys.stderr.write("heavy: " + " ".join(name for name in {HEAVY!r} if name in sys.modules))
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [[], ["--turns", 2, "--n", 2, "--stop", "x y, z", "--min-p", 0.1], ["--dry-run"]])
def test_a_client_of_a_server_imports_no_torch(tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    with serving(Server()) as address:
        words = ["generate", "--engine", "openai", "--teacher", "a/model", "--base-url", address, "--json", "--quiet"]
        words += ["--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out", *arguments]
        code, out, err = finish(start(SCRIPT, *words))
    assert (code, err) == (0, "heavy: ")
    assert json.loads(out) and (tmp_path / "out").exists() == ("--dry-run" not in arguments)
