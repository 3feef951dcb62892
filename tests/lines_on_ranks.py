"""Run command lines of gemma2 one after the other in several processes that torchrun could have started.

    found = lines_on_ranks(3, folder, {"name": ["generate", ...], ...})     found["name"][rank].code, .out, .err

The processes start once for all lines: a command that ends in a clean error leaves them connected.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from processes import BARE_CHECKOUT, finish

__all__ = ["Ended", "lines_on_ranks", "serve"]


@dataclass(frozen=True)
class Ended:
    """What became of a command line in one process; code -1 is a traceback."""

    code: int
    out: str
    err: str


def lines_on_ranks(count: int, folder: Path, lines: dict[str, list[str]], **environment: str) -> dict[str, list[Ended]]:
    """What became of each command line, by rank. The working directory is `folder`, whose modules can be imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"} | environment
    shared["PYTHONPATH"] = os.pathsep.join((str(folder), str(Path(__file__).parent)))
    command = [sys.executable, "-c", BARE_CHECKOUT + "from lines_on_ranks import serve\nserve()", json.dumps(lines)]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    try:
        ended = [finish(process) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(code == 0 for code, _, _ in ended), ended
    of_ranks = [json.loads(out) for _, out, _ in ended]
    return {name: [Ended(**found[name]) for found in of_ranks] for name in lines}


def serve() -> None:
    """Run the lines in this process, and print what became of them."""
    from gemma2.cli.main import run

    found = {}
    for name, words in json.loads(sys.argv[1]).items():
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = run(words)
            except SystemExit as error:
                code = int(error.code or 0)
            except Exception:
                traceback.print_exc()
                code = -1
        found[name] = asdict(Ended(code, out.getvalue(), err.getvalue()))
        if code == -1:
            break
    sys.stdout.write(json.dumps(found))
