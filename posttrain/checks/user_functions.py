"""Reward functions imported before anything is loaded: a misspelt name shows in a second, not after an hour of RL."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.posttrain.rewards.functions import load_function
from gemma2.posttrain.schemas import PairsConfig
from gemma2.posttrain.schemas.config import Config

__all__ = ["check_function", "functions_of"]

LONGEST = 300.0  # seconds that the import of a module may take
# The child says on its last line what it refuses; what the user's module prints comes before it.
CHILD = """
import json, sys
from gemma2.core.errors import Gemma2Error
from gemma2.posttrain.rewards.functions import load_function
found = None
try:
    load_function(*sys.argv[1:])
except Gemma2Error as error:
    found = [type(error).__name__, error.what, error.hint]
print()
print(json.dumps(found))
"""


def functions_of(config: Config) -> list[tuple[str, str]]:
    """(option, module:function) of every function that a configuration names."""
    found = [("--reward-fn", name) for name in getattr(config, "reward_fn", ())]
    judge = getattr(config, "judge_fn", None)
    found += [("--judge-fn", judge)] if judge else []
    if isinstance(config, PairsConfig) and config.judge_model is None and ":" in config.judge:
        found.append(("--judge", config.judge))
    return found


def check_function(option: str, name: str, isolated: bool) -> None:
    """Raise UsageError for a function that does not exist, InputError for one whose module fails.

    isolated  import in a child process: nothing of the user's code stays in this one
    """
    if isolated:
        _import_in_child(name, option)
    else:
        load_function(name, option)


def _import_in_child(name: str, option: str) -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, name, option],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired as error:
        what = f"{option} {name!r}: its module was still being imported after {LONGEST:.0f} s"
        raise InputError(what, "do the work in the function, not when its module is imported") from error
    last = (done.stdout.splitlines() or [""])[-1]
    try:
        found = json.loads(last)
    except ValueError as error:
        detail = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(
            f"{option} {name!r}: importing its module ended Python ({detail})", "fix the module"
        ) from error
    if found is not None:
        kind, what, hint = found
        error_type: type[Gemma2Error] = UsageError if kind == "UsageError" else InputError
        raise error_type(what, hint)
