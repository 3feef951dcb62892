"""A hub on this machine: models in folders, ranges of their files, and what goes wrong on the way, on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = ".safetensors"  # in large file storage: the etag is the SHA-256, the bytes come from another path


class FakeHub:
    """Serves `models` (owner/name -> folder). `fault(name, first, end)` says what happens to a request for a range:

    None      it is answered
    "cut"     half of it is sent, then the connection is closed
    "whole"   the range is ignored
    "etag"    the file is another one by now
    a number  that HTTP status
    It may wait, for an event or for as long as a slow line takes.
    """

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.fault: Callable[[str, int, int], str | int | None] = lambda name, first, end: None
        self.ranges: list[tuple[str, int, int]] = []  # asked for, in order
        self.sent = 0  # bytes of weights
        self.wrong_digest = False
        self.digests: dict[Path, str] = {}  # of files that were asked for
        self.lock = threading.Lock()
        self.url = ""

    def digest(self, path: Path) -> str:
        data = path.read_bytes()
        found = hashlib.sha256(data) if path.suffix == LFS else hashlib.sha1(b"blob %d\0" % len(data) + data)
        return found.hexdigest()[::-1] if self.wrong_digest and path.suffix == LFS else found.hexdigest()

    def take(self, count: int) -> None:
        """Called before some bytes of weights are sent."""
        with self.lock:
            self.sent += count

    @contextmanager
    def serving(self) -> Iterator[FakeHub]:
        hub = self

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address) -> None:
                pass  # clients that go away

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args) -> None:
                pass

            def reply(self, status: int, body: bytes = b"", **headers: object) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                storage = parts[0] == "storage"
                api = parts[:2] == ["api", "models"]
                parts = parts[2:] if api else parts[1:] if storage else parts
                folder = hub.models.get("/".join(parts[:2]))
                if folder is None:
                    self.reply(401, X_Error_Code="RepoNotFound")
                elif api:
                    self.describe(folder, "/".join(parts[:2]), parts[2:])
                else:
                    self.file(folder / "/".join(parts[4:]), storage)

            def describe(self, folder: Path, name: str, rest: list[str]) -> None:
                files = sorted(file for file in folder.iterdir() if file.is_file())
                found: object = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
                if rest[:1] == ["tree"]:
                    found = [self.entry(file) for file in files]
                self.reply(200, json.dumps(found).encode(), Content_Type="application/json")

            def entry(self, file: Path) -> dict[str, object]:
                size, digest = file.stat().st_size, self.digest(file)
                lfs = {"lfs": {"oid": digest, "size": size, "pointerSize": 134}} if file.suffix == LFS else {}
                return {"type": "file", "path": file.name, "size": size, "oid": digest[:40], **lfs}

            def digest(self, file: Path) -> str:
                if file not in hub.digests:
                    hub.digests[file] = hub.digest(file)
                return hub.digests[file]

            def file(self, path: Path, storage: bool) -> None:
                if not path.is_file():
                    self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
                    return
                size, digest = path.stat().st_size, self.digest(path)
                asked = self.headers.get("Range")
                if path.suffix == LFS and not storage:
                    fault = None
                    if asked:
                        first, _, last = asked.removeprefix("bytes=").partition("-")
                        hub.ranges.append((path.parent.name, int(first), int(last) + 1))
                        fault = hub.fault(*hub.ranges[-1])
                    if isinstance(fault, int):
                        self.reply(fault)
                        return
                    etag = "e" * 64 if fault == "etag" else digest
                    where = f"/storage{self.path}?fault={fault}"
                    self.reply(302, Location=where, X_Linked_Etag=f'"{etag}"', X_Linked_Size=size, X_Repo_Commit=COMMIT)
                    return
                headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
                fault = urlsplit(self.path).query.partition("fault=")[2]
                first, end = 0, size
                if asked and fault != "whole":
                    numbers = asked.removeprefix("bytes=").split("-")
                    first, end = int(numbers[0]), int(numbers[1]) + 1
                    headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
                self.send_response(206 if "Content-Range" in headers else 200)
                for name, value in {**headers, "Content-Length": end - first}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.send(path, first, first + (end - first) // 2 if fault == "cut" else end)
                    self.close_connection = fault == "cut"

            def send(self, path: Path, first: int, end: int) -> None:
                with path.open("rb") as file:
                    file.seek(first)
                    while first < end:
                        piece = file.read(min(1 << 20, end - first))
                        hub.take(len(piece) if path.suffix == LFS else 0)
                        self.wfile.write(piece)
                        first += len(piece)

        server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
