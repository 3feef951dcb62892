"""A real HTTP server on this machine that answers like an OpenAI-compatible one, and misbehaves on demand."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

from waiting import PATIENCE

Fault = Callable[[BaseHTTPRequestHandler, Any], None]  # answers a request badly
KEY = "sk-a-secret-that-must-not-be-written-4711"


class Server:
    """Answers `You said: ...`. `faults(number, body)` may return what to do instead with the number-th request."""

    def __init__(self, faults=lambda number, body: None, before=lambda body: None):
        self.faults = faults
        self.before = before  # called while the request counts as busy; may wait for something
        self.requests = []  # (number, headers, body)
        self.paths = []  # of the requests
        self.answered = []  # seeds, in the order of the answers
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def seeds(self):
        return [body["seed"] for _, _, body in self.requests]

    def completion(self, body):
        text = f"You said: {body['messages'][-1]['content']} ({body['seed'] % 1000})"
        logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]}
        return {
            "id": "x",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "length" if len(text) > 4 * body.get("max_tokens", 10**9) else "stop",
                    "logprobs": logprobs if body.get("logprobs") else None,
                }
            ],
            "usage": {"prompt_tokens": sum(len(m["content"]) for m in body["messages"]), "completion_tokens": 7},
        }

    def handle(self, handler, body):
        with self.lock:
            number = len(self.requests)
            self.requests.append((number, {name.lower(): value for name, value in handler.headers.items()}, body))
            self.paths.append(handler.path)
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            self.before(body)
        finally:  # before the answer: its reader may send the next request at once
            with self.lock:
                self.busy -= 1
        (self.faults(number, body) or self.succeed)(handler, body)

    def succeed(self, handler, body):
        with self.lock:  # before the answer: its reader may look here at once
            self.answered.append(body["seed"])
        reply(handler, 200, self.completion(body))


def reply(handler, status, document, headers=()):
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


def refuse(status, message="no", headers=(), **error):
    """A fault: this status with OpenAI's error document."""
    return lambda handler, body: reply(handler, status, {"error": {"message": message, **error}}, headers)


def text(content):
    """A fault: status 200 with this body."""
    return lambda handler, body: reply(handler, 200, content)


def cut_short(handler, body):
    """A fault: the connection closes in the middle of the announced body."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "4000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def reset(handler, body):
    """A fault: the connection is reset without an answer."""
    handler.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def hang(released):
    """A fault: no answer until an event is set, then none at all."""

    def fault(handler, body):
        released.wait(PATIENCE)
        handler.close_connection = True

    return fault


@contextmanager
def serving(server):
    """The address of a running server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms for an ACK

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.path.partition("?")[0].endswith("/chat/completions"):  # a redirect leads to other folders
                reply(self, 404, {"error": {"message": f"no {self.path}"}})
            else:
                try:
                    server.handle(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        def log_message(self, *arguments):
            return None

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # the default is 5: further connections come a second later

        def handle_error(self, request, client_address):
            return None

    http = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
