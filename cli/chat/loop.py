"""The loop of `gemma2 chat`: a message, its answers; lines that begin with a slash are commands."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from gemma2.core.errors import Gemma2Error, InputError

from .input_lines import InputLines
from .screen import Answered, Screen

if TYPE_CHECKING:
    from gemma2.posttrain.chat.speaker import Speaker
    from gemma2.posttrain.chat.talk import Talk

__all__ = ["HELP", "Chat"]

HELP = {
    "/help": "this list",
    "/clear": "begin a new conversation",
    "/undo": "take back the last question and its answer",
    "/retry": "answer the last question again, with another seed",
    "/edit": "change the last question, then answer it",
    "/set KEY=N": "temperature, top_p, top_k, min_p, max_new_tokens, seed; alone: show them",
    "/system TEXT": "a system text for the whole conversation; alone: none",
    "/save FILE": "write the conversation",
    "/load FILE": "continue a saved conversation",
    "/tokens": "tokens of the conversation, and how many fit",
    "/score RM": "score the last answers with a reward model",
    "/vote a|b": "with --against: note which answer is better, for gemma2 reward",
    "/swap": "with --against: exchange the places of the two models",
    "/quit": "end; so does Ctrl-D. Ctrl-C ends an answer",
    '"""': "begin and end a message of several lines",
}


class Chat:
    """One or two speakers, a conversation, a screen."""

    def __init__(self, speakers: Sequence[Speaker], talk: Talk, screen: Screen) -> None:
        self.speakers, self.talk, self.screen = list(speakers), talk, screen
        self.interrupted = False
        self.begin = ""  # what the next line already says, after /edit

    def run(self, lines: InputLines) -> None:
        """Read and answer until the end of input or /quit."""
        self.screen.say("/help lists the commands, Ctrl-D ends")
        with self._interrupts():
            while True:
                try:
                    begin, self.begin = self.begin, ""
                    line = lines.message(">>> ", begin)
                except EOFError:
                    self.screen.write("\n")
                    break
                except KeyboardInterrupt:
                    self.screen.write("\n")
                    self.screen.say("Ctrl-D or /quit ends")
                    continue
                if line.strip() == "/quit":
                    break
                self.take(line)
        lines.keep()

    def take(self, line: str) -> None:
        """One line of input. What goes wrong is a line, and the chat goes on."""
        if not line.strip():
            return
        try:
            if line.startswith("/"):
                self._command(line)
            else:
                self.ask(line)
        except Gemma2Error as error:
            self.screen.say(f"error: {error}")

    def ask(self, question: str) -> list[Answered]:
        """Answer a question and keep both."""
        from gemma2.posttrain.models.sampler import SamplingParams

        settings = self.talk.settings
        params = SamplingParams(
            settings.max_new_tokens, settings.temperature, 1, settings.top_p, settings.top_k, settings.min_p
        )
        for model, speaker in enumerate(self.speakers):
            speaker.prompt(self.talk.messages(model, question))  # refuses what has no room, before anything is drawn
        streams = [
            speaker.answer(self.talk.messages(model, question), params, settings.seed)
            for model, speaker in enumerate(self.speakers)
        ]
        self.interrupted = False
        if len(streams) == 1:
            found = [self.screen.one(streams[0], lambda: self.interrupted)]
        else:
            found = self.screen.two(self.talk.models, streams, lambda: self.interrupted)
        self.talk.turns.append((question, [one.text.strip() for one in found]))
        self.talk.settings = settings.changed(f"seed={settings.seed + 1}")
        return found

    # --- commands -----------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/undo": self._undo,
            "/retry": self._retry,
            "/edit": self._edit,
            "/set": self._set,
            "/system": self._system,
            "/save": lambda rest: self.talk.save(_file(rest)),
            "/load": lambda rest: self.talk.load(_file(rest)),
            "/tokens": self._tokens,
            "/score": self._score,
            "/vote": self._vote,
            "/swap": self._swap,
        }
        if name not in commands:
            from difflib import get_close_matches

            near = get_close_matches(name, commands, 1)
            raise InputError(f"unknown command {name}", f"did you mean {near[0]}?" if near else "/help lists them")
        commands[name](rest.strip())
        if name in ("/save", "/load"):
            self.screen.say(f"{name[1:]}: {len(self.talk.turns)} turns, {rest.strip()}")

    def _help(self, _: str) -> None:
        for name, line in HELP.items():
            self.screen.say(f"  {name:14}{line}")

    def _clear(self, _: str) -> None:
        self.talk.turns.clear()
        self.screen.say("a new conversation")

    def _undo(self, _: str) -> None:
        self.screen.say(f"took back: {self.talk.undo()}")

    def _retry(self, _: str) -> None:
        self.ask(self.talk.undo())

    def _edit(self, _: str) -> None:
        self.begin = self.talk.undo()

    def _set(self, rest: str) -> None:
        self.talk.settings = self.talk.settings.changed(rest)
        self.screen.say(", ".join(f"{key}={value:g}" for key, value in self.talk.settings.document().items()))

    def _system(self, rest: str) -> None:
        self.talk.system = rest
        self.screen.say(f"system text: {rest or 'none'}")

    def _tokens(self, _: str) -> None:
        for model, speaker in enumerate(self.speakers):
            messages = self.talk.messages(model)
            turns = [one for one in messages if one["role"] != "system"]
            used = len(speaker.form.conversation_ids(messages)) if turns else 0
            self.screen.say(
                f"{self.talk.models[model]}: {used} of {speaker.context} tokens, {speaker.computed} computed"
            )

    def _score(self, rest: str) -> None:
        if not rest:
            raise InputError("/score needs a reward model", "write /score DIR")
        if not self.talk.turns:
            raise InputError("nothing to score", "ask something first")
        from gemma2.core.outputs.hub import locate_model
        from gemma2.posttrain.rewards.model import RewardModel

        model = RewardModel.from_dir(locate_model(rest, "/score"))
        for number, name in enumerate(self.talk.models):
            *before, answer = self.talk.messages(number)
            score = float(model.score_text([before], [answer["content"]], [False])[0])
            self.screen.say(f"{name}: {score:.3f}")

    def _vote(self, rest: str) -> None:
        better = self.talk.vote(rest)
        self.screen.say(f"{better} is better: kept in {self.talk.votes}; both continue from its answer")

    def _swap(self, _: str) -> None:
        self.talk.swap()
        self.speakers.reverse()
        self.screen.say(f"left: {self.talk.models[0]}, right: {self.talk.models[1]}")

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Ctrl-C ends an answer while one is drawn, and the line while one is typed; never the program."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            if not _drawing(frame):
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _drawing(frame: FrameType | None) -> bool:
    """Whether the main thread is in `ask`: then the answer ends after its next token."""
    while frame is not None:
        if frame.f_code is Chat.ask.__code__:
            return True
        frame = frame.f_back
    return False


def _file(rest: str) -> Path:
    if not rest:
        raise InputError("a file is missing", "write /save FILE or /load FILE")
    return Path(rest).expanduser()
