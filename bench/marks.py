"""The judge of the embedded models as a term of a reward, with columns of its parts: for a weight of 0.

A file apart: a run is continued only if the code of its reward functions is as it was, which bench/hacking.py is not
while its tables are being worked on.
"""

from typing import Any

from gemma2.posttrain.tiny.tasks import judge_scores


def marks(*columns: Any, **named: Any) -> list[dict[str, float]]:
    """The judge's score as `reward`, and `accuracy` and `style` as it has them."""
    found = judge_scores(*columns, **named)
    return [{"reward": one["judge"], "accuracy": one["accuracy"], "style": one["style"]} for one in found]
