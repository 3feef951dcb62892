"""Whether the machines of a job see the same disk, found out at the start and not at the first save.

Rank 0 writes a token next to `--out`; the first process of each machine looks for it; it is removed. Nothing is loaded
before that. Rank 0 holds the lock of the output meanwhile: a token that it finds then is left over from a killed start,
and is removed. Torch-free to import.
"""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack, suppress
from pathlib import Path

from gemma2.core.errors import OutputError, UsageError
from gemma2.core.outputs.staging import locked, remove_tokens
from gemma2.core.ranks import Ranks, announced, announced_here, join

__all__ = ["check_shared_disk"]


def check_shared_disk(command: str, out: Path) -> None:
    """Raise UsageError, on rank 0 in words and on the others silently, if a machine of the job does not see `out`.

    A job on one machine is not checked.
    """
    if announced_here() == announced():
        return
    check_token(join(command), out, os.environ.get("GROUP_RANK", "0"))


def check_token(ranks: Ranks, out: Path, node: str) -> None:
    """Write a token on rank 0 and look for it on every rank. node: the number of this rank's machine."""
    with ExitStack() as held:
        token = ranks.on_main(lambda: _written(out, held))
        try:
            found = _sees(out, token)
            missing = sorted({place for place, seen in ranks.gather((node, found)) if not seen})
        finally:
            if ranks.is_main:
                with suppress(OSError):
                    (out.parent / token).unlink()
    ranks.on_main(lambda: _say(missing, out))


def _written(out: Path, held: ExitStack) -> str:
    """Write a token and return its name; `held` keeps the lock of the output."""
    name = f".{out.name}.token-{secrets.token_hex(8)}"
    held.enter_context(locked(out))
    remove_tokens(out)
    try:
        (out.parent / name).write_bytes(b"")
    except OSError as error:
        raise OutputError(f"--out {out}: {error.strerror}", "choose a place that can be written") from error
    return name


def _sees(out: Path, token: str) -> bool:
    with suppress(OSError):
        os.listdir(out.parent)  # a network file system asks its server again
    return (out.parent / token).exists()


def _say(missing: list[str], out: Path) -> None:
    if missing:
        machines = "machine " + missing[0] if len(missing) == 1 else "machines " + ", ".join(missing)
        raise UsageError(
            f"--out {out} is not on a disk that all machines share: {machines} of the job does not see it",
            "give a path on a shared disk, the same on each machine",
            "--out",
        )
