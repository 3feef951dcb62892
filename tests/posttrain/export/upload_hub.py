"""A hub on this machine that takes uploads: repositories, large files by their digest, commits. Faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_secretSecretSecret0123456789"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
LARGE = (".safetensors", ".gguf", "tokenizer.json")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


class UploadHub:
    """`fault(path)` may return a status that a PUT of a large file is answered with; `says` is the body of it."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.fault: Callable[[int], int | None] = lambda number: None
        self.says = ""
        self.puts = 0
        self.requests: list[str] = []
        self.url = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, object, dict[str, str]]:
        self.requests.append(f"{method} {path}")
        if path.startswith("/storage/"):
            return self.store(path.rpartition("/")[2], body)
        if token != f"Bearer {self.token}":
            return 401, {"error": f"Invalid credentials {token}"}, {}
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = Repository(asked["visibility"] == "private")
            return 200, {"url": f"{self.url}/{name}"}, {}
        if path == "/api/validate-yaml":
            return 200, {}, {}
        name = "/".join(parts[2:4]) if parts[0] == "api" else f"{parts[0]}/{parts[1].removesuffix('.git')}"
        found = self.repositories.get(name)
        if found is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if parts[4:5] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": files}, {}
        if parts[4:5] == ["commit"]:
            return self.commit(found, body)
        if path.endswith("/objects/batch"):
            return 200, {"transfer": "basic", "objects": list(map(self.place, json.loads(body)["objects"]))}, {}
        siblings = [{"rfilename": file} for file in sorted(found.files)]
        return 200, {"id": name, "private": found.private, "sha": COMMIT, "siblings": siblings}, {}

    def place(self, asked: dict) -> dict:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        known = asked["oid"] in self.storage
        return entry if known else {**entry, "actions": {"upload": {"href": f"{self.url}/storage/{asked['oid']}"}}}

    def store(self, oid: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        self.puts += 1
        status = self.fault(self.puts)
        if status is not None:
            return status, {"error": self.says}, {}
        assert hashlib.sha256(body).hexdigest() == oid
        self.storage[oid] = body
        return 200, {}, {}

    def commit(self, repository: Repository, body: bytes) -> tuple[int, object, dict[str, str]]:
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repository.files[value["path"]] = self.storage[value["oid"]]
            elif item["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        return 200, {"commitUrl": f"{self.url}/org/name/commit/{COMMIT}", "commitOid": COMMIT}, {}

    @contextmanager
    def serving(self) -> Iterator[UploadHub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = urlsplit(self.path).path
                status, document, more = hub.answer(self.command, path, body, self.headers.get("Authorization"))
                text = json.dumps(document).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(text), "Content-Type": "application/json", **more}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = handle_any

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
