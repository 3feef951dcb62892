"""Run command lines of gemma2 one after the other in a process whose accelerator is simulated.

    python run_commands.py < {"name": ["words", ...], ...}

Prints {"name": {"code", "operations", "waits", "said"}, ...}.

GEMMA2_PLANTED=1 leaves the random numbers of the sampler on the CPU: what a forgotten `.to(device)` would do.
GEMMA2_KERNEL=flex gives the device a flex_attention, which is eager attention under that name; GEMMA2_KERNEL=uncapped
one without the soft cap.
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


def plant_kernel(capped: bool) -> None:
    """Let `flex_attention` run on the device: torch's own is compiled for real ones."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    from gemma2.posttrain.attention import kernels

    def attend(*arguments: object, **options: object) -> object:
        return eager_attention_forward(*arguments, **options | ({} if capped else {"softcap": None}))

    kernels.DEVICES["flex_attention"] = ("sim",)
    AttentionInterface.register("flex_attention", attend)
    AttentionMaskInterface.register("flex_attention", eager_mask)


def main() -> None:
    """Read the command lines, run them, print what became of them."""
    lines = json.load(sys.stdin)
    accelerator.install()
    from gemma2.cli.main import run

    if "GEMMA2_PLANTED" in os.environ:
        plant()
    if "GEMMA2_KERNEL" in os.environ:
        plant_kernel(os.environ["GEMMA2_KERNEL"] == "flex")
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
