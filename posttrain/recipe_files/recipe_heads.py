"""The plan in the head comment of each machine's recipe, written by `make recipes` from the planner.

# gemma2 sft: what the recipe is for            written by hand
# Run: gemma2 sft --config NAME ...             written by hand; the plan is of this command line
# Plan: PEAK of CAPACITY GB, in PHASE: parts    written here
KEY: VALUE

python -m gemma2.posttrain.recipe_files.recipe_heads
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from gemma2.configs import machine_recipes

from .machines import cell_named, plan_of

__all__ = ["fresh_text", "write_heads"]

WIDTH = 120
PLAN, MORE = "# Plan: ", "#   "


def fresh_text(path: Path) -> str:
    """The text of a machine's recipe with the plan that the planner gives it."""
    cell = cell_named(path.stem)
    assert cell is not None, f"{path.name} is not COMMAND-SIZE-MACHINE"
    plan = plan_of(cell)
    words = f"{plan.sum} at the peak, in the phase {plan.memory.peak.name}: {plan.parts()}"
    planned = textwrap.wrap(words, WIDTH, initial_indent=PLAN, subsequent_indent=MORE, break_on_hyphens=False)
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    kept = [line for line in head if not line.startswith((PLAN, MORE))]
    return "\n".join([*kept, *planned, *lines[len(head) :]]) + "\n"


def write_heads() -> list[Path]:
    """Write the plan into every recipe in which it is not that of the planner; return these."""
    changed = []
    for path in machine_recipes().values():
        text = fresh_text(path)
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    write_heads()
