"""A server that redirects to another gets neither prompts nor keys there: every HTTP client that is used, on loopback.

The OpenAI engine and the judge, which is the same client: tests/posttrain/generation/engines/test_addresses.py.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gemma2.core.errors import InputError

TOKEN = "hf_a_token_for_the_hub_alone"


@contextmanager
def server(answer):
    """A server that calls `answer(handler)` for each request and keeps (method, headers, body)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append((self.command, {name.lower(): value for name, value in self.headers.items()}, body))
            answer(self)

        do_POST = do_HEAD = do_GET

        def log_message(self, *arguments):
            return None

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}", seen
    finally:
        http.shutdown()
        http.server_close()


def plain(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "2")
    handler.end_headers()
    handler.wfile.write(b"{}")


def leading_to(address, status):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Location", f"{address}/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_prompts_of_rl_do_not_follow_a_redirect_of_the_vllm_server(status):
    requests = pytest.importorskip("requests")
    from trl.generation.vllm_client import VLLMClient

    from gemma2.posttrain.rl.vllm import _SeededClient, _Seeds

    with server(plain) as (other, there), server(leading_to(other, status)) as (address, here):
        client = object.__new__(VLLMClient)  # its constructor waits for a real vLLM
        client.session, client.base_url, client.model = requests.Session(), address, "m"
        guarded = _SeededClient(client, _Seeds())
        guarded._seeds.first = 1
        with client.session, pytest.raises(InputError, match=r"--vllm-server-url redirects to http://127\.0\.0\.1"):
            guarded.generate([[1, 2, 3]], 1, {})
    assert here and not there


@pytest.mark.parametrize("status", [302, 307, 308])
def test_the_token_of_the_hub_stays_at_the_hub(status, monkeypatch):
    """Storage that the hub redirects to is asked without it."""
    from huggingface_hub import constants, get_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with server(plain) as (other, there), server(leading_to(other, status)) as (address, here):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with get_session().stream("GET", f"{address}/file", headers=headers) as response:
            assert response.read() == b"{}"
    assert TOKEN in here[0][1]["authorization"]
    assert there and all(TOKEN not in str(seen) for seen in there)
