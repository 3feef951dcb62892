"""Chat turns to token ids and back, exact for Gemma 2 (Gemma 2 report, Tables 4 and 5) and for any chat template.

    <bos><start_of_turn>user\\n{text}<end_of_turn>\\n<start_of_turn>model\\n{text}<end_of_turn>\\n

The tokenizer's own template decides the shape. It is rendered with a stand-in word for every message, and the
result is cut at the stand-ins and at the control tokens. Control tokens of the template become their ids; all other
text, so everything that a user or a model wrote, is encoded with control-token parsing off.

Deviations from `tokenizer.apply_chat_template(tokenize=True)`, whose ids are otherwise reproduced:
1. A control token spelled inside a message is plain text, never a control token.
2. The text of a model turn is encoded apart from its header, so that training sees the generation prompt's own ids.
3. Messages are stripped (Gemma's template does it; others do not).
4. A system message is folded into the first user turn, "{system}\\n\\n{user}", where the template has no system role.
5. A training example ends at the last `<end_of_turn>`, by default followed by `<eos>`: "The model ends a conversation
   with <end_of_turn><eos>". What a template writes after that is never a target and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError

from gemma2.core.errors import InputError

from .shapes.turns import ROLES, SKIP_HINT, Message, TurnError, check_order, fold_system
from .template_time import TemplateOutOfBounds, bounded_rendering, check_rendered

if TYPE_CHECKING:
    from transformers import GenerationConfig  # imports torch

    from .tokenizer import Tokenizer

__all__ = ["GEMMA_TEMPLATE", "ChatFormat", "EndOfTurn", "Message"]

EndOfTurn = Literal["eot", "eot+eos"]

# Gemma 2's pre-trained checkpoints come without a template, but with the control tokens of this one.
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{% if role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_STAND_IN = re.compile(r"Qzx([a-j]+)xzQ")
_DIGITS, _LETTERS = "0123456789", "abcdefghij"
_PROBE: list[Message] = [
    {"role": "user", "content": "Is 2 + 2 = 4?"},
    {"role": "assistant", "content": "Yes.\n\nIt is."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Count."},
]
_TOOL_USE: list[Message] = [*_PROBE[:2], {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}]
_TWO_USERS: list[Message] = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]


@dataclass(frozen=True)
class _Piece:
    """A stretch of a rendered conversation: one control token, or a run of text."""

    text: str
    control: int | None = None  # id of a control token
    message: int | None = None  # index of the message whose text this is; None: written by the template
    target: bool = False  # learned: text of a model turn, or what closes it
    answer: bool = False  # text of a model turn, learned or not


class ChatFormat:
    """Renders, masks and parses conversations for one tokenizer that has a chat template.

    A tokenizer without one gets Gemma's if it has Gemma's turn tokens, and is saved with it.
    Messages are `{"role": "user" | "assistant" | "system", "content": text}`; `model` is read as `assistant`.
    `generation_config` adds the stop ids that a model brings along. Raises `InputError` for a tokenizer whose template
    is missing or cannot be reproduced exactly.
    """

    def __init__(self, tokenizer: Tokenizer, generation_config: GenerationConfig | None = None) -> None:
        self.tokenizer = tokenizer
        self._controls = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        try:
            self._learn_the_template(generation_config)
        except InputError as error:
            if tokenizer.name_or_path in error.what:
                raise
            raise type(error)(f"{tokenizer.name_or_path}: {error.what}", error.hint) from error

    def _learn_the_template(self, generation_config: GenerationConfig | None) -> None:
        tokenizer = self.tokenizer
        if tokenizer.chat_template == "":
            raise self._unusable("has an empty chat template")
        if not tokenizer.chat_template:
            if not {"<start_of_turn>", "<end_of_turn>"} <= self._controls.keys():
                raise self._unusable("has no chat template")
            tokenizer.chat_template = GEMMA_TEMPLATE
        self._control_pattern = _control_pattern(tokenizer)
        self.alternates, self.has_tool_role = False, True  # not yet known: the probes must reach the template
        self.has_system_role = self._takes_a_system_message()
        self.has_tool_role = self._takes(_TOOL_USE)
        self.alternates = not self._takes(_TWO_USERS)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.end_of_turn_id = self._find_end_of_turn()
        self.stop_ids = _stop_ids(self.eos_id, self.end_of_turn_id, generation_config)
        self._headers = self._find_headers()
        self._check_against_the_template()

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation up to and including the header of the model turn that comes next."""
        turns = self.normalise(messages)
        if turns[-1]["role"] == "assistant":
            raise InputError("the prompt ends with a model turn", "end it with a user message")
        return self._encode(self._pieces(turns, generation_prompt=True))[0]

    def check_prompt(self, messages: list[Message]) -> None:
        """Raise InputError for messages that this template does not take as a prompt. Encodes nothing."""
        turns = self.normalise(messages)
        if turns[-1]["role"] == "assistant":
            raise InputError("the prompt ends with a model turn", "end it with a user message")
        self._pieces(turns, generation_prompt=True)

    def conversation_ids(self, messages: list[Message]) -> list[int]:
        """Ids of a whole conversation, as the template writes it."""
        return self._encode(self._pieces(self.normalise(messages)))[0]

    def example(
        self,
        messages: list[Message],
        end_of_turn: EndOfTurn = "eot+eos",
        truncated: bool = False,
        unlearned: Collection[int] = (),
    ) -> tuple[list[int], list[bool]]:
        """Training ids and loss mask, equally long. True on the text of every model turn and on its end of turn, except
        for the messages whose numbers are in `unlearned`.

        The last turn ends with `<end_of_turn>` (`eot`) or `<end_of_turn><eos>` (`eot+eos`; the same where both are
        one token, as in ChatML). `truncated`: the last turn was cut off, so its end is neither written nor learned.
        """
        turns = self.normalise(messages)
        if turns[-1]["role"] != "assistant":
            raise InputError("the conversation does not end with a model turn", 'end it with role "assistant"')
        folded = len(messages) - len(turns)  # a system message that is now part of the first user message
        context = {index - folded for index in unlearned}
        pieces = [replace(piece, target=False) if piece.message in context else piece for piece in self._pieces(turns)]
        end = next(i for i, piece in enumerate(pieces) if piece.message == len(turns) - 1) + 1
        if not truncated:
            end += 1 + next(i for i, piece in enumerate(pieces[end:]) if piece.control is not None)
        ids, mask = self._encode(pieces[:end])
        if truncated or end_of_turn == "eot" or self.eos_id in (None, ids[-1]):
            return ids, mask
        return [*ids, self.eos_id], [*mask, mask[-1]]

    def normalise(self, messages: list[Message]) -> list[Message]:
        """Known roles only, text stripped, system text folded where the template has no system role."""
        if not messages:
            raise InputError("the conversation is empty", "give at least one user message")
        turns = [{"role": _role(message["role"]), "content": message["content"].strip()} for message in messages]
        turns = turns if self.has_system_role else fold_system(turns)
        if any(turn["role"] == "tool" for turn in turns):
            if not self.has_tool_role:
                raise TurnError("the chat template has no role 'tool'", SKIP_HINT)
        elif self.alternates:
            check_order(turns[1:] if turns[0]["role"] == "system" else turns)
        return turns

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without control tokens."""
        controls = set(self._controls.values())
        return self._text([i for i in ids if i not in controls])

    def token_text(self, token: int) -> str:
        """The text of one token, control tokens by their name; a blank is a blank, not the tokenizer's sign."""
        return self._text([token])

    def is_control(self, token: int) -> bool:
        """Whether a token is one that no text can be encoded to."""
        return token in self._controls.values()

    def parse(self, ids: list[int]) -> list[Message]:
        """Messages of a rendered conversation: the inverse of `conversation_ids` and of `example`.

        A generation prompt at the end, the header of a turn that has not begun, gives no message.
        """
        messages: list[Message] = []
        pieces = list(self._unrender(ids))
        for before, run in pairwise(pieces):
            for (opener, header), role in self._headers.items():
                begun = run is not pieces[-1] or run.text != header or role != "assistant"
                if before.control == opener and run.text.startswith(header) and begun:
                    messages.append({"role": role, "content": run.text.removeprefix(header)})
        return messages

    def _pieces(self, turns: list[Message], generation_prompt: bool = False) -> list[_Piece]:
        """Cut the rendered conversation into control tokens, the template's text and the messages."""
        pieces: list[_Piece] = []
        # Splitting by a pattern with one group alternates: template text, number of a message, template text, ...
        for position, part in enumerate(_STAND_IN.split(self._render(turns, generation_prompt))):
            if position % 2:
                index = int(part.translate(str.maketrans(_LETTERS, _DIGITS)))
                answer = turns[index]["role"] == "assistant"
                pieces.append(_Piece(turns[index]["content"], None, index, answer, answer))
            else:
                pieces.extend(self._split_controls(part))
        missing = set(range(len(turns))) - {piece.message for piece in pieces}
        if missing:
            raise InputError(f"the chat template leaves out message {min(missing) + 1}", "reshape the conversation")
        return pieces

    def _render(self, turns: list[Message], generation_prompt: bool) -> str:
        words = [f"Qzx{str(i).translate(str.maketrans(_DIGITS, _LETTERS))}xzQ" for i in range(len(turns))]
        stand_ins = [{"role": turn["role"], "content": word} for turn, word in zip(turns, words, strict=True)]
        try:
            return self._rendered(stand_ins, generation_prompt)
        except (TemplateSyntaxError, UndefinedError, SecurityError) as error:  # not one of `raise_exception`
            what = f"the chat template fails: {type(error).__name__}: {error}"
            raise InputError(what, "correct the template, or give another with the tokenizer") from error
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            hint = "let user and assistant alternate, beginning with user"
            raise InputError(f"the chat template refuses the turns {roles}: {error}", hint) from error

    def _rendered(self, messages: list[Message], generation_prompt: bool) -> str:
        """What the template makes of short messages, within the bounds of `core/limits.py`."""
        with bounded_rendering(self.tokenizer.chat_template):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        return check_rendered(str(text))

    def _split_controls(self, text: str) -> Iterator[_Piece]:
        start = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > start:
                yield _Piece(text[start : match.start()])
            yield _Piece("", self._controls[match.group().strip()])
            start = match.end()
        if start < len(text):
            yield _Piece(text[start:])

    def _encode(self, pieces: list[_Piece]) -> tuple[list[int], list[bool]]:
        """Ids and target mask of the pieces."""
        runs = _join(pieces)
        texts = [run.text for run in runs if run.control is None]
        # Commands check lengths themselves: verbose would warn of indexing errors for a row that is dropped.
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded = iter(self.tokenizer(texts, **options)["input_ids"] if texts else ())
        ids: list[int] = []
        mask: list[bool] = []
        for run in runs:
            run_ids = next(encoded) if run.control is None else [run.control]
            ids += run_ids
            mask += [run.target] * len(run_ids)
        return ids, mask

    def _unrender(self, ids: list[int]) -> Iterator[_Piece]:
        # An unknown character inside a message is text, though <unk> is listed among the control tokens.
        controls = set(self._controls.values()) - {self.tokenizer.unk_token_id}
        for is_control, group in groupby(ids, key=controls.__contains__):
            if is_control:
                yield from (_Piece("", i) for i in group)
            else:
                yield _Piece(self._text(list(group)))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _takes_a_system_message(self) -> bool:
        return self._takes([{"role": "system", "content": "s"}, *_PROBE])

    def _takes(self, messages: list[Message]) -> bool:
        """Whether the template renders these messages."""
        try:
            self._pieces(messages)
        except TemplateOutOfBounds:
            raise
        except InputError:
            return False
        return True

    def _find_end_of_turn(self) -> int:
        pieces = _join(self._pieces(_PROBE))
        closing = [piece.control for piece in pieces if piece.target and piece.control is not None]
        if len(closing) != 2 or closing[0] != closing[1]:
            raise self._unusable("has a template without one control token that ends each model turn")
        return closing[0]

    def _find_headers(self) -> dict[tuple[int | None, str], str]:
        """(control token, text after it) -> role, for every role that the template writes."""
        turns = [{"role": "system", "content": "s"}, *_PROBE] if self.has_system_role else _PROBE
        pieces = self._pieces(turns)
        headers: dict[tuple[int | None, str], str] = {}
        for opener, header, content in zip(pieces, pieces[1:], pieces[2:], strict=False):
            if content.message is not None and opener.control is not None and header.control is None:
                headers[opener.control, header.text] = turns[content.message]["role"]
        return headers

    def _check_against_the_template(self) -> None:
        # As `apply_chat_template(tokenize=True)`, whose tokenizer would run within the bounds of the template.
        texts = [self._rendered(_PROBE, False), self._rendered(_PROBE[:-1], True)]
        expected, prompt = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        rendered = self.conversation_ids(_PROBE)
        if rendered != expected or self.prompt_ids(_PROBE[:-1]) != prompt or rendered[: len(prompt)] != prompt:
            raise self._unusable("has a template that writes a model turn otherwise than its generation prompt")

    def _unusable(self, why: str) -> InputError:
        return InputError(
            f"the tokenizer of {self.tokenizer.name_or_path!r} {why}", "use an instruct model's tokenizer"
        )


def _join(pieces: list[_Piece]) -> list[_Piece]:
    """Join neighbouring text into runs that are encoded together, and spread targets to the end of each model turn.

    The text of a model turn begins a separate run: its header ends as the generation prompt does.
    """
    runs: list[_Piece] = []
    in_target = False
    for piece in pieces:
        in_target = piece.target or (in_target and not piece.answer)
        if runs and runs[-1].control is None and piece.control is None and not piece.answer:
            runs[-1] = replace(runs[-1], text=runs[-1].text + piece.text)
        else:
            runs.append(replace(piece, target=in_target))
        in_target = in_target and piece.control is None
    return runs


def _role(role: str) -> str:
    if role not in ROLES:
        raise InputError(f"unknown role {role!r}", f"use one of {', '.join(ROLES)}")
    return ROLES[role]


def _control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches any control token, the longest first, with the white space that its `lstrip` and `rstrip` swallow."""
    tokens = sorted((t for t in tokenizer.added_tokens_decoder.values() if t.special), key=lambda t: -len(t.content))
    return re.compile("|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in tokens))


def _stop_ids(eos_id: int | None, end_of_turn_id: int, generation_config: GenerationConfig | None) -> list[int]:
    more = generation_config.eos_token_id if generation_config is not None else None
    listed = more if isinstance(more, list) else [more]
    return sorted({i for i in (eos_id, end_of_turn_id, *listed) if i is not None})
