"""Conversations that a teacher writes, turn by turn; for several turns it plays both sides.

    prompt -> model turn 1 -> user turn 1 -> model turn 2 -> ... -> model turn T         2T - 1 turns drawn

For a user turn the roles are swapped: an instruction opens, the user's turns so far become the assistant's
and the model's answers the user's, so that the teacher's next turn is the user's next message. System text
is left out of the swapped conversation: a user does not see it.

A conversation ends early when a turn is cut at the limit, is empty or no answer (filtered, a call of a tool, ...), or
when the next prompt would not fit. What counts then are the turns up to the last model turn with a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma2.posttrain.data.rows import Message, Prompt
from gemma2.posttrain.data.seeds import derived_seed

from .engines.base import LENGTH, STOP, Completion, Key

EMPTY = "empty"  # the fate of a conversation whose first answer is finished and has no text

__all__ = ["Dialogue", "DialoguePlan"]


@dataclass(frozen=True)
class DialoguePlan:
    """The work per prompt: `n` conversations of `turns` model turns.

    `empty_counts`: whether a finished answer without a text is an answer. It teaches nothing, so `generate` drops it;
    but it is one of the samples of a policy, and a reward model must learn what it is worth.
    """

    n: int
    seed: int
    turns: int = 1
    user_instruction: str = ""
    empty_counts: bool = False

    @property
    def drawn_turns(self) -> int:
        """Turns that are drawn for one conversation, the user's among them."""
        return 2 * self.turns - 1


@dataclass
class Dialogue:
    """One sample of one prompt: `drawn` alternates between model and user turns, the model's first."""

    plan: DialoguePlan
    prompt: Prompt
    row: int
    sample: int
    drawn: list[Completion] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """The seed of this sample: it follows from the run's seed, the prompt's number and the sample's alone."""
        return derived_seed(self.plan.seed, self.row, self.sample)

    @property
    def key(self) -> Key:
        """The key of the next turn."""
        return self.row, self.sample, len(self.drawn)

    @property
    def turn_seed(self) -> int:
        """The seed of the next turn; the first turn has the sample's."""
        return derived_seed(self.seed, len(self.drawn)) if self.drawn else self.seed

    @property
    def ended(self) -> bool:
        """Whether no further turn is to be drawn."""
        if not self.drawn:
            return False
        last = self.drawn[-1]
        return len(self.drawn) == self.plan.drawn_turns or last.finish_reason != STOP or not last.text

    def take(self, known: Mapping[Key, Completion]) -> None:
        """Add the next turn, where it is known and still wanted."""
        if not self.ended and self.key in known:
            self.drawn.append(known[self.key])

    def next_prompt(self) -> list[Message]:
        """The messages that the teacher reads to write the next turn."""
        if len(self.drawn) % 2 == 0:
            return self._messages(len(self.drawn))
        swapped = {"user": "assistant", "assistant": "user", "model": "user"}
        said = [message for message in self._messages(len(self.drawn)) if message["role"] != "system"]
        return [
            {"role": "user", "content": self.plan.user_instruction},
            *({"role": swapped[message["role"]], "content": message["content"]} for message in said),
        ]

    @property
    def answers(self) -> list[Completion]:
        """The model turns that were not dropped and have a text, unless the plan counts empty ones."""
        kept = [turn for turn in self.drawn[::2] if turn.finish_reason in (STOP, LENGTH)]
        return [turn for turn in kept if turn.text or self.plan.empty_counts]

    @property
    def fate(self) -> str:
        """`stop`; `length`: the last model turn was cut; otherwise there is no answer, and this is why."""
        answers = self.answers
        if answers:
            return answers[-1].finish_reason
        return EMPTY if self.drawn[0].finish_reason == STOP else self.drawn[0].finish_reason

    @property
    def messages(self) -> list[Message]:
        """The conversation up to its last model turn."""
        return self._messages(2 * len(self.answers) - 1)

    def _messages(self, count: int) -> list[Message]:
        roles = ("assistant", "user")
        drawn = [{"role": roles[i % 2], "content": turn.text} for i, turn in enumerate(self.drawn[:count])]
        return [*self.prompt.messages, *drawn]
