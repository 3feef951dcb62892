"""Runs command lines of `gemma2` in processes that are forked from one that has imported everything: 0.1 s, not 4 s.

Each is a process as from a shell: main() with its signals, streams, working directory and environment; it can be
killed. With a C compiler the calls by which it changes files are counted, and one of them can be made to fail (shim.c).

    with zygote(calls=True) as parent:
        run = parent.start("sft", "--model", model, ..., fault=Fault(root, 17, errno.ENOSPC))
        code, out, err = run.finish()
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import BARE_CHECKOUT
from waiting import PATIENCE, wait_for

HERE = Path(__file__).resolve().parent
# As in shim.c; a positive number is the errno of one failure.
READ_ONLY, VANISHED, FULL, INTERRUPTED, KILL, HALF, COUNT = -6, -5, -4, -3, -2, -1, 0


@dataclass(frozen=True)
class Fault:
    """Which call fails, and how.

    root     folder below which calls count
    number   of the call, from 0
    how      an errno (this call fails), HALF (it does half of its bytes), KILL (SIGKILL before it), INTERRUPTED (EINTR)
             FULL (it and all later calls that need room fail with ENOSPC), READ_ONLY (it and all later calls fail with
             EROFS), VANISHED (before it, `root` is renamed to `root.gone`), COUNT (nothing fails)
    log      file that gets a line "number call grows path" per call; grows: 1 if a full disk refuses it
    """

    root: Path
    number: int = 0
    how: int = COUNT
    log: Path | None = None


class Run:
    """One forked command: what Popen offers, as far as the tests need it."""

    def __init__(self, connection: socket.socket, folder: Path, pid: int) -> None:
        self.pid, self.returncode, self.folder = pid, None, folder
        self._connection = connection
        connection.setblocking(False)

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            try:
                line = self._connection.recv(64)
            except BlockingIOError:
                return None
            self._connection.close()
            assert line, "the zygote has ended"
            self.returncode = int(line)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def finish(self, seconds: float = PATIENCE) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a process that should end by itself."""
        wait_for(lambda: self.poll() is not None, seconds)
        out, err = ((self.folder / name).read_text("utf-8", "replace") for name in ("out", "err"))
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.returncode, out, err


class Zygote:
    """The parent of the commands. Made by `zygote()`."""

    def __init__(self, address: str, scratch: Path, pid: int) -> None:
        self._address, self._scratch, self.pid = address, scratch, pid

    def start(
        self,
        *words: object,
        fault: Fault | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        before: str = "",
    ) -> Run:
        """Start one command line.

        folder        its working directory; by default this process's
        environment   variables that differ from this process's
        before        Python source that runs in the process first, with everything imported: to plant a fault
        """
        place = Path(tempfile.mkdtemp(dir=self._scratch))
        armed = None if fault is None else [str(fault.root), fault.number, fault.how, str(fault.log or "")]
        request = {
            "words": [str(word) for word in words],
            "folder": str(folder or Path.cwd()),
            "environment": dict(environment or {}),
            "streams": str(place),
            "fault": armed,
            "before": before,
        }
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self._address)
        connection.sendall(json.dumps(request).encode() + b"\n")
        pid = b""
        while not pid.endswith(b"\n"):
            part = connection.recv(1)
            assert part, "the zygote has ended"
            pid += part
        return Run(connection, place, int(pid))

    def run(self, *words: object, **options: object) -> tuple[int, str, str]:
        """Run one command line to its end."""
        return self.start(*words, **options).finish()  # type: ignore[arg-type]


def has_compiler() -> bool:
    """Whether calls can be counted here: Linux with a C compiler."""
    return sys.platform == "linux" and shutil.which("cc") is not None


@contextmanager
def zygote(calls: bool = False, commands: Sequence[str] = ()) -> Iterator[Zygote]:
    """Start the parent process, and end it with everything that it started.

    calls      count calls that change files
    commands   those whose modules it imports; by default all, and torch
    """
    with tempfile.TemporaryDirectory(prefix="zygote-") as name:
        scratch = Path(name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        if calls:
            shim = scratch / "shim.so"
            words = ["cc", "-O1", "-shared", "-fPIC", "-o", shim, HERE / "shim.c", "-ldl"]
            subprocess.run([str(word) for word in words], check=True)
            environment["LD_PRELOAD"] = str(shim)
        address = str(scratch / "socket")
        here = BARE_CHECKOUT + "import runpy, sys\nrunpy.run_path(sys.argv[1], run_name='__main__')\n"
        command = [sys.executable, "-c", here, str(HERE / "zygote_server.py"), address, *commands]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            wait_for(lambda: Path(address).exists() or process.poll() is not None)
            assert process.poll() is None, "the zygote did not start"
            yield Zygote(address, scratch, process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
