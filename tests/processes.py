"""Starts `gemma2`, or a script that imports it, in an interpreter of its own; works in a bare checkout too."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from waiting import PATIENCE, wait_for

ROOT = Path(__file__).resolve().parents[1]

# What conftest.py does for this process; and Ctrl-C works in it also where the tests run in the background.
BARE_CHECKOUT = f"""
import importlib.util, signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)
if importlib.util.find_spec("gemma2") is None:
    sys.modules["gemma2"] = types.ModuleType("gemma2")
    sys.modules["gemma2"].__path__ = [{str(ROOT)!r}]
"""
MAIN = "from gemma2.cli.main import main\nmain()\n"


def start(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a Python script; its stdout and stderr are pipes unless `options` say otherwise."""
    command = [sys.executable, "-c", BARE_CHECKOUT + script, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **(pipes | {"preexec_fn": _in_a_terminal} | options))


def _in_a_terminal() -> None:
    """Undo what a child inherits of nohup, under which the tests may run."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def finish(process: subprocess.Popen[str], seconds: float = PATIENCE) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that should end by itself."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def gemma2(*arguments: object, **options: Any) -> tuple[int, str, str]:
    """Run one command line to its end."""
    return finish(start(MAIN, *arguments, **options))


def children_of(pid: int) -> set[int]:
    """All descendants of a process."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(path.parent.name)
            found |= {child, *children_of(child)}
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that run."""
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text()}


def wait_until_gone(pids: set[int]) -> None:
    """Wait for the end of processes that are not ours to wait for."""
    wait_for(lambda: not alive(pids))
