"""The state of a chat: turns of one or two models, settings, and the files that it is saved to. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path

from gemma2.core.errors import InputError, OutputError
from gemma2.core.json_files import read_json, write_json
from gemma2.posttrain.data.chat import Message

__all__ = ["DrawSettings", "Talk"]


@dataclass(frozen=True)
class DrawSettings:
    """What `/set` changes.

    temperature     0 is greedy
    top_p, top_k, min_p  as in `gemma2 generate`
    max_new_tokens  limit of an answer
    seed            of the next answer; one more after each
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0

    BOUNDS = {  # noqa: RUF012  # not a field
        "temperature": (0, 5),
        "top_p": (1e-6, 1),
        "top_k": (0, 10**9),
        "min_p": (0, 1),
        "max_new_tokens": (1, 10**6),
        "seed": (0, 2**63 - 1),
    }

    def changed(self, text: str) -> DrawSettings:
        """Return the settings with `key=value ...` changed. Raises InputError naming the key and its bounds."""
        found = self
        for word in text.split():
            key, equals, value = word.partition("=")
            names = [one.name for one in fields(self)]
            if key not in names:
                near = get_close_matches(key, names, 1)
                raise InputError(
                    f"unknown setting '{key}'", f"did you mean '{near[0]}'?" if near else f"use {', '.join(names)}"
                )
            kind = type(getattr(self, key))
            low, high = self.BOUNDS[key]
            try:
                number = kind(value)
            except ValueError:
                number = None
            if not equals or number is None or not low <= number <= high:
                raise InputError(
                    f"{word} is not a value of {key}", f"write /set {key}=N, {_least(low)} and at most {high:g}"
                )
            found = replace(found, **{key: number})
        return found

    def document(self) -> dict[str, float]:
        """The settings by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def _least(low: float) -> str:
    return "above 0" if 0 < low < 1 else f"at least {low:g}"


@dataclass
class Talk:
    """Turns so far. Each user message has one answer per model.

    models   names, in the order in which they are shown
    system   a system text, or ""
    turns    (what the user wrote, answers in the order of `models`)
    votes    file to which preferences are appended
    """

    models: list[str]
    system: str = ""
    turns: list[tuple[str, list[str]]] = field(default_factory=list)
    settings: DrawSettings = field(default_factory=DrawSettings)
    votes: Path = Path("votes.jsonl")

    def messages(self, model: int, question: str | None = None) -> list[Message]:
        """What a model has seen, and the next question."""
        found: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answers in self.turns:
            found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answers[model]}]
        return found + ([{"role": "user", "content": question}] if question is not None else [])

    def undo(self) -> str:
        """Take back the last question with its answers, and return it. Raises InputError if there is nothing."""
        if not self.turns:
            raise InputError("nothing to take back", "ask something first")
        return self.turns.pop()[0]

    def swap(self) -> None:
        """Exchange the places of the two models."""
        if len(self.models) != 2:
            raise InputError("one model only", "start with --against OTHER")
        self.models.reverse()
        for _, answers in self.turns:
            answers.reverse()

    def vote(self, choice: str) -> str:
        """Append the preference of the last answers to `votes`, a file that `gemma2 reward` reads.

        choice  "a" or "b": the place of the better answer. Returns the better model's name.
        """
        if len(self.models) != 2 or not self.turns:
            raise InputError("nothing to compare", "start with --against OTHER and ask something")
        if choice not in ("a", "b"):
            raise InputError(f"'{choice}' is not a choice", "write /vote a or /vote b")
        better = "ab".index(choice)
        asked, answers = self.turns[-1]
        if answers[0] == answers[1]:
            raise InputError("both answers are the same", "a pair needs two different answers")
        shared = self._shared_prompt()
        row = {
            "prompt": [*shared, {"role": "user", "content": asked}],
            "chosen": [{"role": "assistant", "content": answers[better]}],
            "rejected": [{"role": "assistant", "content": answers[1 - better]}],
            "chosen_model": self.models[better],
            "rejected_model": self.models[1 - better],
        }
        try:
            with self.votes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputError(f"{self.votes} cannot be written ({error.strerror})", "give --votes FILE") from error
        # Both continue from the better answer, so that the next pair has one prompt.
        self.turns[-1] = (asked, [answers[better]] * 2)
        return self.models[better]

    def _shared_prompt(self) -> list[Message]:
        """The turns before the last. Raises InputError where the two models saw different ones: not a pair then."""
        before = Talk(self.models, self.system, self.turns[:-1])
        left, right = before.messages(0), before.messages(1)
        if left != right:
            raise InputError(
                "the two models saw different turns before this one, so their answers are not a pair",
                "vote after every answer (both then continue from the better one), or /clear first",
            )
        return left

    def save(self, path: Path) -> None:
        """Write the conversation as JSON. An existing file is replaced only if it is one of these."""
        if path.exists():
            self._check(path, _read(path))
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent} is not a folder", "give a file in a folder that exists")
        turns = [{"user": asked, "answers": answers} for asked, answers in self.turns]
        document = {"chat": 1, "models": self.models, "system": self.system, "settings": self.settings.document()}
        try:
            write_json(path, document | {"turns": turns})
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror})", "give another file") from error

    def load(self, path: Path) -> None:
        """Continue from a saved conversation, with the models of this one."""
        found = _read(path)
        turns = self._check(path, found)
        number = len(self.models)
        for _, answers in turns:
            if len(answers) != number:
                raise InputError(
                    f"{path} is a conversation with {len(answers)} models, this one has {number}", "--against"
                )
        settings = DrawSettings()
        stored = found.get("settings")
        for key, value in (stored if isinstance(stored, dict) else {}).items():
            settings = settings.changed(f"{key}={value}")
        self.system, self.turns, self.settings = str(found.get("system") or ""), turns, settings

    @staticmethod
    def _check(path: Path, found: Mapping[str, object]) -> list[tuple[str, list[str]]]:
        wrong = InputError(f"{path} is not a saved conversation", "give a file that /save wrote")
        turns = found.get("turns")
        if found.get("chat") != 1 or not isinstance(turns, list):
            raise wrong
        result = []
        for turn in turns:
            asked, answers = (turn.get("user"), turn.get("answers")) if isinstance(turn, dict) else (None, None)
            if (
                not isinstance(asked, str)
                or not isinstance(answers, list)
                or not all(isinstance(a, str) for a in answers)
            ):
                raise wrong
            result.append((asked, list(answers)))
        return result


def _read(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise InputError(f"{path} does not exist", "give a file that /save wrote")
    return read_json(path)
