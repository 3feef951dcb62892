"""Who is asked: the key, the address, where it leads, and the model that answers."""

from __future__ import annotations

from contextlib import suppress

import pytest
from asking import ask, requests_of
from bad_answers import redirect
from chat_server import KEY, Server, serving, text

from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.sources import iter_rows
from gemma2.posttrain.generation.engines import retry, server
from gemma2.posttrain.generation.generate import run_generate
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import GenerateConfig
from gemma2.posttrain.schemas.config import resolve

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(retry, "FIRST", 0.005)


def test_a_key_is_needed_but_for_a_server_of_ones_own(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="OPENAI_API_KEY holds no key"):
        server.ServerEngine(GenerateConfig(teacher="m", prompts="p", engine="openai"), SILENT)
    given = {"teacher": "m", "prompts": "p", "engine": "openai", "base_url": "http://localhost:1/v1"}
    with pytest.raises(UsageError, match="MY_KEY holds no key"):
        server.ServerEngine(GenerateConfig(**given, api_key_env="MY_KEY"), SILENT)
    fake = Server()
    ask(fake, 1)  # a server of one's own may need none
    assert KEY not in fake.requests[0][1]["authorization"]
    monkeypatch.setenv("MY_KEY", "another")
    with pytest.raises(UsageError, match="--allow-key MY_KEY"):
        ask(fake, 1, api_key_env="MY_KEY")
    monkeypatch.setenv("GEMMA2_ALLOW_KEYS", "MY_KEY")
    ask(fake, 1, api_key_env="MY_KEY")
    assert fake.requests[1][1]["authorization"] == "Bearer another"


def test_a_newline_behind_the_key_is_no_part_of_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    assert len(ask(Server(), count=1)) == 1


def test_a_key_that_cannot_be_one_is_refused_without_being_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nkey")
    with pytest.raises(UsageError, match="holds characters that no key has") as caught:
        ask(Server(), count=1)
    assert "secret" not in str(caught.value)


def test_an_address_with_credentials_from_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://user:secret@127.0.0.1:1/v1")
    config = GenerateConfig(teacher="a/model", prompts="p", engine="openai")
    with pytest.raises(UsageError, match="holds credentials") as caught:
        server.ServerEngine(config, SILENT)
    assert "secret" not in str(caught.value)


PORTS = ["http://127.0.0.1:65536/v1", "http://127.0.0.1:99999", "http://127.0.0.1:-1/v1", "http://127.0.0.1:0/v1"]
ADDRESSES = [*PORTS, "http://[::1/v1", "http://a b/v1", "127.0.0.1:8000", "http://", "http://u:pass word@h:1"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_no_server_has_is_refused_at_once(address, monkeypatch):
    with pytest.raises(UsageError) as by_flag:
        resolve(GenerateConfig, flags={"teacher": "m", "prompts": "p", "engine": "openai", "base_url": address})
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(UsageError) as by_environment:
        server.ServerEngine(GenerateConfig(teacher="m", prompts="p", engine="openai"), SILENT)
    for caught in (by_flag, by_environment):
        assert caught.value.hint and "\n" not in str(caught.value) and "word" not in str(caught.value)


class Listening:
    """A progress that keeps the warnings."""

    task, note = SILENT.task, SILENT.note

    def __init__(self):
        self.warnings = []
        self.warn = self.warnings.append


def test_another_model_and_another_address_are_recorded_and_warned_of_once(tmp_path):
    """The server sends every request elsewhere, and says that it used a model of another name in a part of them."""
    whole = Server.completion

    class Elsewhere(Server):
        def completion(self, body):
            return whole(self, body) | {"model": "a/model-0613" if body["seed"] % 2 else "a/model"}

    def faults(number, body):
        path = fake.paths[number]
        return redirect("/other/v1/chat/completions?token=secret") if path.startswith("/v1") else None

    fake, heard = Elsewhere(faults), Listening()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "p {i}"}}\n' for i in range(12)))
    with serving(fake) as address:
        config = GenerateConfig(teacher="a/model", prompts=prompts, engine="openai", base_url=address)
        result = run_generate(config, RunOptions(tmp_path / "out"), heard)
    used = result.summary["models_used"]
    assert used.keys() == {"a/model", "a/model-0613"} and sum(used.values()) == 12
    other = address.removesuffix("/v1") + "/other/v1"
    assert result.summary["redirected_to"] == {other: 12} and result.summary["server"] == address
    assert sorted(heard.warnings) == [
        f"{address} leads to {other}: that server reads the prompts",
        f"{address} says that it used a/model-0613, where a/model was asked for",
    ]
    manifest = (tmp_path / "out" / "gemma2.json").read_text()
    assert '"models_used"' in manifest and "secret" not in manifest


def test_warnings_have_an_end():
    heard = Listening()
    engine = server.ServerEngine(
        GenerateConfig(teacher="m", prompts="p", engine="openai", base_url="http://localhost:1/v1"), heard
    )
    for i in range(100):
        engine._warn("prompts", f"prompt {i}")
    engine._warn("models", "another model")
    engine.close()
    assert len(heard.warnings) == server.MOST_NAMES + 1


def test_nothing_follows_a_redirect_to_another_server():
    """Neither the key nor the prompts: 307 and 308 would send the body again."""
    other = Server()
    with serving(other) as elsewhere, pytest.raises(InputError, match=r"redirects to .*, which would read the prompts"):
        ask(Server(lambda number, body: redirect(f"{elsewhere}/chat/completions")), 1, retries=5)
    assert not other.requests


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_compressed_answer_is_refused_before_it_is_unpacked(status):
    """One that was not asked for: a megabyte would become gigabytes, in an error too."""

    def packed(handler, _):
        handler.send_response(status)
        handler.send_header("Content-Encoding", "gzip, gzip")
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(b"x" * 10)

    fake = Server(lambda number, body: packed)
    with pytest.raises(InputError, match="encoding gzip, gzip, which was not requested"):
        ask(fake, 1, retries=0)
    assert fake.requests[0][1]["accept-encoding"] == "identity"


def test_an_error_without_end_is_not_read_whole(monkeypatch):
    def endless(handler, _):
        handler.send_response(400)
        handler.end_headers()
        with suppress(OSError):
            for _ in range(200):
                handler.wfile.write(b"x" * 10_000)
        handler.close_connection = True

    monkeypatch.setattr(server, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="it has more than 0 MiB"):
        ask(Server(lambda number, body: endless), 1, retries=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "nonsense://h:1"), ("ALL_PROXY", "http://h:99999"), ("SSL_CERT_FILE", "/does/not/exist")],
)
def test_an_environment_that_allows_no_client_is_one_line(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "")
    config = GenerateConfig(
        teacher="m", prompts="p", engine="openai", base_url="https://127.0.0.1:9/v1", retries=0, timeout=5.0
    )
    with pytest.raises(Gemma2Error) as caught:
        engine = server.ServerEngine(config, SILENT)
        try:
            list(engine.complete(requests_of(1), ()))
        finally:
            engine.close()
    assert caught.value.hint and "\n" not in str(caught.value)


def longest(completions, **_):
    """A reward function that no empty answer may come to."""
    assert all(completions)
    return [float(len(text)) for text in completions]


def test_the_best_of_n_is_chosen_among_the_answers_that_have_a_text(tmp_path):
    """One prompt has one empty sample, one has nothing but calls of tools."""

    def faults(number, body):
        prompt = body["messages"][-1]["content"]
        if prompt == "p 2":
            return text({"choices": [{"message": {"content": None, "tool_calls": [{}]}, "finish_reason": "stop"}]})
        if prompt == "p 1" and next(second, None):
            return text({"choices": [{"message": {"content": " "}, "finish_reason": "stop"}]})
        return None

    second = iter([True])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "p {i}"}}\n' for i in range(3)))
    with serving(Server(faults)) as address:
        config = GenerateConfig(
            teacher="a/model",
            prompts=prompts,
            engine="openai",
            base_url=address,
            n=2,
            best=1,
            reward_fn=f"{__name__}:longest",
        )
        result = run_generate(config, RunOptions(tmp_path / "out"))
    rows = [row.columns for row in iter_rows(result.out)]
    assert [row["prompt"][0]["content"] for row in rows] == ["p 0", "p 1"]
    assert all(row["completion"][0]["content"] and row["reward"] > 0 for row in rows)
    assert result.summary["dropped"] == {"tool_calls": 2, "empty": 1}
