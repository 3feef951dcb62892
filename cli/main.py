"""Entry point: signals, exit codes, and one line for every expected failure.

Exit codes: 0 done; 1 a clear error; 2 usage or configuration; 3 a guard stopped the run; 130 / 143 interrupted.
A bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import warnings

from gemma2.core.interrupts import Signals

__all__ = ["main"]


def _environment() -> None:
    """Set environment defaults; values that the user has set take precedence."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the search for them takes 20 ms of every start
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # users can do nothing about deprecations inside libraries


def _fail(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")  # set by torchrun for each of its processes
    who = "error" if rank == "0" else f"error (rank {rank})"
    sys.stderr.write(f"{who}: {' '.join(message.split())}\n")
    return code


def _interrupted(number: int) -> int:
    sys.stderr.write("\ninterrupted\n")
    return 128 + number


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; bugs propagate."""
    from gemma2.core.errors import Gemma2Error, refusal

    from .app import invoke
    from .terminal.console import UsageProblem

    try:
        return invoke(arguments)
    except UsageProblem as problem:
        return _fail(str(problem), 2)
    except Gemma2Error as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        line = refusal(error)
        if line is None:
            raise
        return _fail(line, 1)


def main() -> None:
    """The console script `gemma2`."""
    signals = Signals()
    signals.install()
    try:
        try:
            _environment()
            code = run(sys.argv[1:])
            sys.stdout.flush()
        except BrokenPipeError:
            # `gemma2 ... | head`: the reader has what it wanted.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
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
    sys.exit(code)


if __name__ == "__main__":
    main()
