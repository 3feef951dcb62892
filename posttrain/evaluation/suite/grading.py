"""Whether an answer is right, as lm-eval 0.4.13 grades its tasks. Torch-free.

An answer's number is taken by a pattern (`#### 42`, or the last number), then answer and target lose what `ignored`
matches, and case; an answer without a match is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .prompts import Asked
from .task import Extraction, SuiteTask

__all__ = ["grade_choices", "grade_text"]

NO_MATCH = "[invalid]"


def grade_choices(task: SuiteTask, asked: Asked, logprobs: Sequence[float]) -> dict[str, int]:
    """metric -> 1 or 0, by the log-likelihoods of the choices; the first of equal ones counts."""
    scores = {"acc": list(logprobs)}
    scores["acc_norm"] = [value / len(text) for value, text in zip(logprobs, asked.choices, strict=True)]
    return {name: int(_best(scores[name]) == asked.target) for name in task.metrics}


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda number: values[number])


def grade_text(task: SuiteTask, asked: Asked, answer: str) -> dict[str, int]:
    """metric -> 1 or 0, one for each filter of the task."""
    target = _compared(task, str(asked.target))
    return {name: int(_compared(task, _extracted(task.filters[name], answer)) == target) for name in task.metrics}


def _extracted(rule: Extraction, answer: str) -> str:
    found = re.findall(rule.pattern, answer)
    if not found:
        return NO_MATCH
    match = found[0 if rule.which == "first" else -1]
    if isinstance(match, tuple):  # the pattern has alternatives
        match = next((part for part in match if part), NO_MATCH)
    return str(match).strip()


def _compared(task: SuiteTask, text: str) -> str:
    for pattern in task.ignored:
        text = re.sub(pattern, "", text)
    return text.lower()
