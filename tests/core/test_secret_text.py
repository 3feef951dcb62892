"""Secrets are masked where they are shown and in what servers repeat; settings that hold one are refused unread."""

from __future__ import annotations

import json

import pytest
from chat_server import Server, serving
from planted_secrets import SECRETS, environment, found_in, search

from gemma2.cli.main import run
from gemma2.core.secret_text import known_forms, masked, secret_in
from gemma2.core.shown import visible, visible_json

KEY = SECRETS["OPENAI_API_KEY"]


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("place", [name for name in SECRETS if name.isupper()])
def test_a_key_of_the_environment_is_masked_in_every_form(place):
    for form in known_forms():
        assert not set(found_in(visible(f"a {form} b").encode()))
    text = json.dumps({"said": f"no key {SECRETS[place]}"})
    assert not set(found_in(visible_json(text).encode())) and "no key" in json.loads(visible_json(text))["said"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no http://me:pass@h:1/v1 here", "no http://***@h:1/v1 here"),
        ("a path http:/me:pass@h/x", "a path http:/***@h/x"),
        ("https://h/x?a=1&api_key=abc&b=2", "https://h/x?a=1&api_key=***&b=2"),
        ("--api-key=sk-abcdefghijklmnop1234", "--api-key=***"),
        ("write to jane@example.com", "write to jane@example.com"),
        ("models/sk-small and task-arithmetic-of-three-models", "models/sk-small and task-arithmetic-of-three-models"),
        ("https://example.com/a?page=2", "https://example.com/a?page=2"),
    ],
)
def test_what_is_shown(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize(
    "values",
    [
        {"request": {"api_key": "x"}},
        {"request": {"extra": [{"Authorization": "Bearer x"}]}},
        {"judge_request": {"hf_token": "x"}},
        {"request": {"user": f"me {KEY}"}},
        {"model": SECRETS["AWS_SECRET_ACCESS_KEY"]},
        {"options": {"data": [{"path": SECRETS["HF_TOKEN"]}]}},
    ],
)
def test_settings_with_a_secret(values):
    path, why = secret_in(values)
    assert path.split(".")[0] in values and not set(found_in(f"{path} {why}".encode()))


def test_settings_without_one(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "word")
    monkeypatch.setenv("OTHER_API_KEY", "/home/me/a.key")
    given = {"model": "a word", "data": "/home/me/a.key", "api_key_env": "OPENAI_API_KEY", "lambda": 1}
    assert secret_in(given | {"request": {"max_tokens": 3, "prompt_cache_key": "x", "eos_token": "y"}}) is None


def test_a_server_that_repeats_keys_gets_none_of_them_recorded(tmp_path, capsys, monkeypatch):
    pytest.importorskip("openai")
    whole = Server.completion

    class Loud(Server):
        def completion(self, body):
            found = whole(self, body) | {"model": f"m-{KEY}"}
            found["choices"][0]["message"]["content"] += f" with {KEY} and {SECRETS['HF_TOKEN']}"
            return found

    (tmp_path / "p.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q"}\n')
    with serving(Loud()) as address:
        words = ["generate", "--teacher", "m", "--engine", "openai", "--prompts", str(tmp_path / "p.jsonl")]
        asked = [*words, "--base-url", address, "--out", str(tmp_path / "out")]
        assert run([*asked, "--set", f"request.api_key={SECRETS['--set']}"]) == 2
        assert run([*asked, "--set", f"request.user={KEY}"]) == 2
        assert not (tmp_path / "out").exists()
        assert run(asked) == 0
    said = capsys.readouterr()
    found, files, _ = search(tmp_path)
    assert found == [] and files > 2 and not set(found_in((said.out + said.err).encode()))
    assert "with *** and ***" in (tmp_path / "out" / "data-00000-of-00001.jsonl").read_text()
