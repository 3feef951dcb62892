"""Two answers side by side on the scale of Gemma's and WARP's human evaluations.

    much better 1.5    better 1    slightly better 0.5    about the same 0        (WARP 2406.16768, section 4)

Positive: the first of the two models is better. A judge sees every pair twice, once in each order, and the score is
the mean: a preference for a position cancels. What it would have been is reported as the order bias,

    mean over prompts of (v_1 + v_2) / 2,   v_k the verdict for the answer that is shown first in order k,

which is 0 for a judge without such a preference, and 1.5 for one that always prefers the first answer strongly.

A reward model has no positions. By its Bradley-Terry probability p = sigmoid(r - r') that the first answer is better,
its expected verdict on this scale is 1.5 (2 p - 1): 0 for equal rewards, +-1.5 for a certain preference (derived).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gemma2.core.json_files import JsonObject
from gemma2.posttrain.evaluation.built_in.row_means import mean_and_se
from gemma2.posttrain.preferences.judge import TWO_ANSWERS, Judge

__all__ = ["LARGEST", "SIDE_PROMPT", "SideBySide", "by_reward", "order_figures"]

LARGEST = 1.5
SIDE_PROMPT = f"""\
{TWO_ANSWERS}Verdict: X
where X is one of: A is much better, A is better, A is slightly better, about the same, B is slightly better, \
B is better, B is much better."""
STEPS = {"much": 1.5, "": 1.0, "slightly": 0.5}
VERDICT_LINE = re.compile(
    r"""verdict[^\n:=]{0,20}[:=]\W{0,6}?
        (?:(?P<same>(?:about\s+)?(?:the\s+)?same\b|(?:an?\s+)?tie\b|equal)
          |(?:answer\W{1,3})?(?P<side>[AB])\W{1,4}(?:is\s+)?(?P<step>much|slightly)?\s*better\b)""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class SideBySide(Judge):
    """The questions to a judge about two answers, and the scores that follow from its replies.

    verdicts  for each prompt the verdicts in both orders, positive for the answer shown first; None: unreadable
    """

    verdicts: list[tuple[float | None, float | None]] = field(default_factory=list)

    def read(self, reply: str) -> float | None:
        """The verdict for the answer that is shown first, -1.5 to 1.5; None for a reply without one.

        A prompt of the user's own may ask for `Better: A`, `B` or `tie`, which counts as 1, -1 and 0.
        """
        found = list(VERDICT_LINE.finditer(reply))
        if not found:
            plain = super().read(reply)
            return None if plain is None else 2 * plain - 1
        last = found[-1]
        if last["same"]:
            return 0.0
        size = STEPS[(last["step"] or "").lower()]
        return size if last["side"].upper() == "A" else -size

    def scores(self, count: int, values: Mapping[int, float | None]) -> list[float | None]:
        """The scores of the first and of the second answer: their sum is 0; None if a verdict is missing."""
        first, second = values[1], values[count]  # shown first: answer 0, then answer 1
        self.verdicts.append((first, second))
        if first is None or second is None:
            return [None, None]
        self.tally["compared"] += 1
        self.tally["orders_disagree"] += first * second > 0
        score = (first - second) / 2
        return [score, -score]


def by_reward(difference: float) -> float:
    """The expected verdict of a reward model whose rewards differ by so much."""
    return LARGEST * math.tanh(difference / 2)  # 2 sigmoid(d) - 1


def order_figures(verdicts: Sequence[tuple[float | None, float | None]]) -> JsonObject:
    """Order bias, with its error, and how often the two orders contradict each other; of prompts with both verdicts."""
    both = [(first, second) for first, second in verdicts if first is not None and second is not None]
    if not both:
        return {}
    bias, se = mean_and_se([(first + second) / 2 for first, second in both])
    first_shown = sum((first > 0) + (second > 0) for first, second in both)
    second_shown = sum((first < 0) + (second < 0) for first, second in both)
    found: JsonObject = {
        "order_bias": bias,
        "order_bias_stderr": None if math.isnan(se) else se,
        "preferred_the_first_shown": first_shown,
        "preferred_the_second_shown": second_shown,
        "orders_contradict": sum(first * second > 0 for first, second in both),
        "compared": len(both),
    }
    return found
