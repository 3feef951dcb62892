"""The page of `gemma2 watch --page`: served to this machine only, to whoever knows its address.

    GET /TOKEN/             the page; /TOKEN/page.js, /TOKEN/page.css
    GET /TOKEN/view.json    the newest view
    GET /TOKEN/stage.json?name=STAGE    figures and curves of a stage

It listens on 127.0.0.1. A random token in every path keeps out other users of the machine and other pages in the
browser; the Host header must name this machine, so that no page can reach it by a name that it points here (DNS
rebinding). Nothing may be read across origins, only GET is answered, and the page may load nothing from elsewhere and
run no script but its own file. Texts of others reach the page in JSON and are set as text.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonObject, finite

__all__ = ["PageServer"]

HERE = Path(__file__).parent
HOST = "127.0.0.1"
HOSTS = {HOST, "localhost"}
FILES = {
    "": ("page.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LONGEST = 4096  # characters of a path


class PageServer:
    """Serves while the block runs. view, stage: return what the page shows; stage returns None for an unknown name."""

    def __init__(
        self, view: Callable[[], JsonObject], stage: Callable[[str], JsonObject | None], port: int | None = None
    ) -> None:
        self.view, self.stage = view, stage
        self.token = secrets.token_urlsafe(24)
        try:
            self._server = _Server((HOST, port or 0), _Handler)
        except OSError as error:
            raise UsageError(
                f"--port {port} cannot be used ({error.strerror})", "give another port, or none: a free one is taken"
            ) from error
        self._server.page = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self._server.server_port}/{self.token}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[bytes, str] | None:
        """Return body and type of the answer to a path; None if there is nothing for it."""
        parts = urlsplit(path)
        empty, _, rest = parts.path.partition("/")
        token, slash, name = rest.partition("/")
        if empty or not slash or not hmac.compare_digest(token.encode(), self.token.encode()):
            return None
        if name in FILES:
            return _file(name)
        found: JsonObject | None = None
        if name == "view.json":
            found = self.view()
        elif name == "stage.json":
            found = self.stage(parse_qs(parts.query).get("name", [""])[0])
        if found is None:
            return None
        try:
            text = json.dumps(found, allow_nan=False)
        except ValueError:  # a number that is not finite
            text = json.dumps(finite(found), allow_nan=False)
        return text.encode(), "application/json"


@cache
def _file(name: str) -> tuple[bytes, str]:
    file, kind = FILES[name]
    return (HERE / file).read_bytes(), f"{kind}; charset=utf-8"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    page: PageServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away in the middle of an answer is not an error."""


class _Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds that a client may be silent
    server_version, sys_version = "gemma2", ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a request for the page or its data."""
        assert isinstance(self.server, _Server)
        elsewhere = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if self._host() not in HOSTS or (elsewhere and self.headers.get("Sec-Fetch-Mode") != "navigate"):
            self._send(403, b"not from here\n", "text/plain")
            return
        found = self.server.page.answer(self.path) if len(self.path) <= LONGEST else None
        if found is None:
            self._send(404, b"not found\n", "text/plain")
        else:
            self._send(200, *found)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer anything else, also other methods, without repeating what was asked."""
        self.close_connection = True
        self._send(405 if code == 501 else code, b"only GET\n" if code == 501 else b"refused\n", "text/plain")

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not logged: the address in them is the key."""

    def _host(self) -> str:
        """The name of the Host header, without its port, which a tunnel may change."""
        host = self.headers.get_all("Host") or []
        if len(host) != 1:
            return ""
        name, _, port = host[0].rpartition(":") if ":" in host[0] else (host[0], "", "0")
        return name.lower() if port.isdecimal() else ""

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
