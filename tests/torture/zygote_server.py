"""The parent process of zygote.py: imports everything once, then forks a process for each request on a socket."""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
from typing import Any

DEATH_SIGNAL, SUBREAPER = 1, 36  # of prctl
PRELOADED = (
    "torch",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "transformers.models.gemma2.modeling_gemma2",
    "trl",
    "peft",
    "datasets",
    "gemma2.merging",
)
WITHOUT_TORCH = (
    *("blake3", "jinja2", "multiprocessing.pool", "numpy", "rensa", "zipfile", "concurrent.futures", "yaml"),
    *("gemma2.cli.main", "gemma2.posttrain.checks.of_command", "gemma2.posttrain.filters.runner"),
    *("gemma2.posttrain.runs.finished", "gemma2.posttrain.runs.inputs", "gemma2.posttrain.data.examples"),
    *("gemma2.posttrain.data.load_tokenizer", "gemma2.posttrain.rewards.functions"),
    *("gemma2.merging.kernels.native", "gemma2.posttrain.training.tracking", "gemma2.posttrain.schemas.warp"),
)


def preload(names: list[str]) -> None:
    """Import what the commands import, so that their processes share it. names: only these commands, without torch."""
    import importlib

    from gemma2.cli.app import COMMANDS, load

    for name in names or COMMANDS:
        load(name)
    for name in WITHOUT_TORCH if names else PRELOADED:
        importlib.import_module(name)
    from gemma2.posttrain.runs import commands

    for name, command in commands.COMMANDS.items():
        assert (names and name not in names) or command.run
    if not names:
        import torch

        torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def child(request: dict[str, Any]) -> None:
    """Become the command of a request; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{request['streams']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        path = request["environment"].get("PYTHONPATH", "")
        sys.path[:0] = [entry for entry in path.split(os.pathsep) if entry]
        sys.argv = ["gemma2", *request["words"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if request["before"]:
            exec(compile(request["before"], "<planted>", "exec"), {"__name__": "planted"})
        if request["fault"] is not None:
            root, number, how, log = request["fault"]
            arm = ctypes.CDLL(None).gemma2_torture_arm
            arm(os.fsencode(root), ctypes.c_long(number), ctypes.c_int(how), os.fsencode(log))
        from gemma2.cli.main import main

        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as Python does at the end of a process
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def serve(address: str) -> None:
    """Fork for each request; answer with the process's id, and with its exit code when it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)  # when the tests are killed
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)  # what a killed command leaves behind becomes ours, and is seen
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(address + ".new")
    server.listen(64)
    os.rename(address + ".new", address)  # it appears when it listens
    waker, woken = socket.socketpair()
    for end in (waker, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno())
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    selector.register(waker, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is waker:
                waker.recv(4096)
                continue
            connection, _ = server.accept()
            request = json.loads(connection.makefile("rb").readline())
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (server, waker, woken, connection, *running.values()):
                    end.close()
                child(request)
            running[pid] = connection
            connection.sendall(f"{pid}\n".encode())
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid in running:
                connection = running.pop(pid)
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path += [here, os.path.dirname(here)]  # planted.py, waiting.py
    preload(sys.argv[3:])
    serve(sys.argv[2])
