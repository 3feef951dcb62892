"""Entry point: signals, exit codes, and one line for every expected failure.

Exit codes: 0 done; 1 a clear error; 2 usage or configuration; 3 a guard stopped the run; 4 an alert of
`gemma2 watch` ended it; 130 / 143 interrupted.
A bug keeps its traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from gemma2.core.interrupts import Interrupted, Signals
from gemma2.core.ranks import LastWord, ProcessBug, RankEnd, follow_launcher, is_launched, leave_job, leave_word
from gemma2.core.streams import drop_unread, settle_streams

from .terminal import opening

__all__ = ["main"]

# Class of an error -> its kind in the object of --json, the most specific first.
KINDS = {
    "UsageError": "usage",
    "PeerLost": "lost",
    "EndedElsewhere": "followed",
    "InputError": "input",
    "OutputError": "output",
    "OutOfMemory": "system",
    "SystemRefusal": "system",
    "GuardStop": "guard",
    "AlertStop": "alert",
    "Gemma2Error": "error",
}


def _environment() -> None:
    """Set environment defaults; values that the user has set take precedence."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the search for them takes 20 ms of every start
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # users can do nothing about deprecations inside libraries
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends a package wherever it is imported


def _fail(message: str, code: int) -> int:
    opening.clear()
    rank = os.environ.get("RANK", "0")  # set by torchrun for each of its processes
    who = "error" if rank == "0" else f"error (rank {rank})"
    from gemma2.core.shown import visible

    sys.stderr.write(f"{who}: {visible(' '.join(message.split()))}\n")
    return code


def _say_as_json(arguments: Sequence[str], kind: str, code: int, what: str, fix: str, where: str = "") -> None:
    """Print the object of an error on stdout, for a command line with --json; the line on stderr stays."""
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" not in words or os.environ.get("RANK", "0") != "0":
        return
    from gemma2.core.shown import visible_json

    error = {"kind": kind, "what": " ".join(what.split()), "where": where or None, "fix": fix, "exit_code": code}
    try:
        sys.stdout.write(visible_json(json.dumps({"error": error}, ensure_ascii=False)) + "\n")
        sys.stdout.flush()
    except OSError:  # a full disk, which may be the error itself; the buffer would fail again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stdout.flush()


def _interrupted(number: int) -> int:
    opening.clear()
    code = 128 + number
    if is_launched():  # the command that has started this process says it
        return code
    sys.stderr.write("\ninterrupted\n")
    with suppress(OSError):
        _say_as_json(sys.argv[1:], "interrupted", code, "interrupted", "start the command again")
    return code


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; bugs propagate."""
    from gemma2.core.errors import Gemma2Error, lost_connection, refusal

    opening.show(arguments)
    _outputs("promised", "forget_promised")
    try:
        from .app import invoke

        code = invoke(arguments)
        if code == 0:
            _outputs("promised", "check_promised")
        _say_kept()
        sys.stdout.flush()  # here, where a full disk behind it is an error like any other
        return code
    except Gemma2Error as error:
        kind = next(name for base, name in KINDS.items() if base in {one.__name__ for one in type(error).__mro__})
        if leave_word(LastWord.of(error)):
            return error.exit_code
        _say_as_json(arguments, kind, error.exit_code, error.what, error.hint, error.where)
        return _fail(str(error), error.exit_code)
    except RankEnd as error:
        leave_word(LastWord("followed", int(error.code or 0)))
        return int(error.code or 0)
    except SystemExit as error:
        if "_GEMMA2_COMPLETE" in os.environ:  # of a shell's completion
            raise
        what, fix = f"code that the command called ended it: sys.exit({error.code!r}){_place(error)}", "take that out"
        if leave_word(LastWord("error", 1, "InputError", what, fix)):
            return 1
        _say_as_json(arguments, "input", 1, what, fix)
        return _fail(f"{what}; {fix}", 1)
    except BrokenPipeError as error:
        if drop_unread():
            return _end_unread()
        if _say_bug(arguments, error):
            return 1
        raise
    except ProcessBug as error:
        _say_bug(arguments, error)
        sys.stderr.write(error.trace)
        return 1
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch.distributed.checkpoint has errors that are no Exception
        line = refusal(error) or _lost(error)
        if line is None:
            if _say_bug(arguments, error):
                return 1
            raise
        what, _, fix = line.partition("; ")
        if lost_connection(error) and is_launched():
            leave_word(LastWord("lost", 1, "PeerLost", what, fix))
            return 1  # the command that has started this process knows which one is gone, and why
        where = str(getattr(error, "filename", None) or "")
        if leave_word(LastWord("error", 1, "SystemRefusal", what, fix, where)):
            return 1
        _say_as_json(arguments, "system", 1, what, fix, where)
        return _fail(line, 1)
    finally:
        opening.clear()


def _lost(error: BaseException) -> str | None:
    """The line of a process of several that has lost another one."""
    from gemma2.core.errors import lost_connection
    from gemma2.core.ranks import announced

    words = lost_connection(error)
    words = words if words and announced() > 1 else None
    return words and f"another process of the job is gone ({words}); see what ended it, then continue with --resume"


def _place(error: BaseException) -> str:
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1:]
    return "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)


def _end_unread() -> int:
    """The exit code where nobody reads stdout any more (`gemma2 ... | head`): the reader has what it wanted.

    Not so where the command had an output to write and had not come to that.
    """
    from gemma2.core.errors import OutputError

    try:
        _outputs("promised", "check_promised")
    except OutputError as error:
        return _fail(f"nobody reads stdout any more; {error.what}; start it again, without the pipe", 1)
    return 0


def _outputs(module: str, function: str) -> list[str]:
    """Call a function of core.outputs where a command has loaded its module; many write nothing and need not."""
    loaded = sys.modules.get(f"gemma2.core.outputs.{module}")
    found: list[str] | None = getattr(loaded, function)() if loaded is not None else None
    return found or []


def _say_kept() -> None:
    """Name the files of others that an output replaced."""
    for note in _outputs("staging", "take_notes"):
        sys.stderr.write(f"note: {note}\n")


def _say_bug(arguments: Sequence[str], error: BaseException) -> bool:
    """Say a bug as --json asks for it, or leave it to the command that has started this process: then return True."""
    import traceback

    opening.clear()
    what = str(error) if isinstance(error, ProcessBug) else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error))
    if leave_word(LastWord("bug", 1, type(error).__name__, what, trace=trace)):
        return True
    _say_as_json(arguments, "bug", 1, what, "report it with the traceback, which is on stderr")
    return False


def main() -> None:
    """The console script `gemma2`."""
    settle_streams()  # before anything opens a file
    signals = Signals()
    try:
        signals.install()
        follow_launcher()
        _environment()
        code = run(sys.argv[1:])
        signals.end()
        if code and signals.caught is not None:  # a library made an expected failure out of the interrupt
            code = _interrupted(signals.caught)
    except BaseException:
        # An interrupt inside an import can surface as another exception, so `caught` decides.
        if signals.caught is None:
            raise
        signals.ended = True
        code = _interrupted(signals.caught)
        signals.end()
    leave_job(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
