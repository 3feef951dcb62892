"""A process that has imported the libraries once, and forks a child for each piece of work.

    caller -- control --> server   (number) and the child's end of a pipe
           <-- control --          ("forked", number, pid), ("ended", number, exit code), ("refused", number, why)
    caller <--  pipe  --> child    sys.path, then (function, arguments); after that whatever the function says

A new interpreter takes 6 to 8 s to import torch, transformers and trl; a fork takes 0.05 s. The server imports and
does nothing else, so there are no threads and no CUDA in it when it forks. multiprocessing's own fork server is not
used: Ctrl-C while it imports is a traceback; it hands the work over before the caller knows the child, so that a
server that dies in between leaves work at large; and it imports the caller's `__main__` in every child.

Here a child gets its work only after the caller has its pid. One that the caller gave up reads the end of its pipe
and ends. The server is in a separate process group, so that the signals of a terminal do not reach it, and ends when
the control connection does.
"""

from __future__ import annotations

import importlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle

__all__ = ["ForkServer", "launch", "serve"]

ENDS = 5.0  # seconds between the end of a connection and that of its process
START = """
import sys, json
path, module, function, arguments = json.loads(sys.argv[1])
sys.path[:] = path
from importlib import import_module
getattr(import_module(module), function)(*arguments)
"""


def launch(
    module: str, function: str, *arguments: object, errors: int | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start `module.function(descriptor, *arguments)` in a new interpreter and process group.

    Returns the process and our end of the connection whose other end is `descriptor`. Its stdout is closed, since
    libraries print on import and stdout belongs to the command; `errors` is its stderr, by default ours.
    """
    ours, theirs = multiprocessing.Pipe()
    call = json.dumps([sys.path, module, function, [theirs.fileno(), *arguments]])
    try:
        process = subprocess.Popen(
            [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-c", START, call],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[theirs.fileno()],
            process_group=0,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


class ForkServer:
    """The caller's side of a server."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.process, self.control = launch(__name__, "serve", list(modules))

    def fork(self, number: int) -> Connection:
        """Ask for a child; returns our end of its pipe. A server that is gone is seen at `control`."""
        ours, theirs = multiprocessing.Pipe()
        with theirs, suppress(OSError):
            self.control.send(number)
            send_handle(self.control, theirs.fileno(), self.process.pid)
        return ours

    def code(self) -> int | None:
        """The exit code of a server whose control connection has ended."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(ENDS)
        return None

    def close(self) -> None:
        """End the server, also while it imports."""
        self.process.kill()
        self.process.wait()
        self.control.close()


def serve(descriptor: int, modules: Sequence[str]) -> None:
    """Import, then fork a child for each request until the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # the libraries' deprecations are not the user's business
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as cli/main.py: it recommends a package on import
    for name in modules:
        with suppress(Exception):  # the work itself reports a library that cannot be imported
            importlib.import_module(name)
    with suppress(EOFError, OSError):  # the caller is gone
        _serve(Connection(descriptor))
    os._exit(0)  # children that are left end by themselves


def _serve(control: Connection) -> None:
    context = multiprocessing.get_context("fork")
    children: dict[int, BaseProcess] = {}
    # A child's sentinel stays open as long as its helpers live, so SIGCHLD tells of its end.
    alarm, bell = socket.socketpair()
    alarm.setblocking(False)
    bell.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
    while True:
        ready = wait([control, alarm])
        if alarm in ready:
            with suppress(BlockingIOError):
                alarm.recv(4096)
        for number in [key for key, process in children.items() if process.exitcode is not None]:
            control.send(("ended", number, children.pop(number).exitcode))
        if control in ready:
            number = control.recv()
            with Connection(recv_handle(control)) as pipe:
                child = context.Process(target=_child, args=(pipe, control, alarm, bell))
                try:
                    child.start()
                except OSError as error:  # the limit of processes or of memory
                    control.send(("refused", number, str(error)))
                    continue
            children[number] = child
            control.send(("forked", number, child.pid))


def _child(pipe: Connection, control: Connection, alarm: socket.socket, bell: socket.socket) -> None:
    """The main function of a child."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for end in (control, alarm, bell):
        end.close()
    try:
        sys.path[:] = pipe.recv()
        function, arguments = pipe.recv()
    except (EOFError, OSError):  # the caller has given it up
        return
    function(*arguments, pipe)
