"""Run command lines of gemma2 one after the other in a process whose accelerator is simulated.

    python run_commands.py < {"name": ["words", ...], ...}

Prints {"name": {"code", "operations", "waits", "said"}, ...}.

GEMMA2_PLANTED=1 leaves the random numbers of the sampler on the CPU: what a forgotten `.to(device)` would do.
"""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import accelerator


def plant() -> None:
    """Hand the sampler numbers of another device."""
    from gemma2.posttrain.models import sampler

    plain = sampler.draw
    sampler.draw = lambda logits, uniforms, params: plain(logits, uniforms.cpu(), params)


def main() -> None:
    """Read the command lines, run them, print what became of them."""
    lines = json.load(sys.stdin)
    accelerator.install()
    from gemma2.cli.main import run

    if "GEMMA2_PLANTED" in os.environ:
        plant()
    found = {}
    for name, words in lines.items():
        before, waits, said = accelerator.seen.operations, accelerator.seen.waits, io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            try:
                code = run(words)
            except Exception:
                traceback.print_exc()
                code = -1
        operations = accelerator.seen.operations - before
        waited = accelerator.seen.waits - waits
        found[name] = {"code": code, "operations": operations, "waits": waited, "said": said.getvalue()[-3000:]}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
