"""With how many processes a run has computed its steps, as one line: "2, from step 4: 1"."""

from __future__ import annotations

import re

__all__ = ["processes_by_step"]


def processes_by_step(said: str, step: int, processes: int) -> str:
    """Return the line of a run that goes on from `step` with `processes`; "" if all of its steps have the same number.

    said  the line so far, or a number alone. What it has from `step` on is computed again, and is left out.

    >>> processes_by_step("2, from step 4: 1", 6, 4)
    '2, from step 4: 1, from step 6: 4'
    >>> processes_by_step("2, from step 4: 1", 2, 1)
    '2, from step 2: 1'
    """
    parts = re.findall(r"(?:from step (\d+): )?(\d+)", said)
    kept = [(int(start or 0), int(many)) for start, many in parts if int(start or 0) < step]
    if not kept or kept[-1][1] != processes:
        kept.append((step, processes))
    later = "".join(f", from step {start}: {many}" for start, many in kept[1:])
    return f"{kept[0][1]}{later}" if later else ""
