"""A language model behind an OpenAI-compatible server as the judge of n answers to a prompt (RLAIF, 2309.00267).

    score       every answer is rated alone: n requests per prompt. score = the number after the last "Score:"
    compare     every two answers, in both orders: n (n - 1) requests. An answer's score is the mean over the others of
                1 if it is better, 1/2 for a tie, 0 if it is worse, each the mean over the two orders, so that a
                preference for a position cancels (2309.00267, section 2.1.3, averages over the orders as well)

A reply without the requested line, or with a score out of bounds, is not a judgement: it is counted, and one is shown.
An answer without a score is in no pair. If one order of a comparison failed, both are left out, since one alone would
carry the preference for a position.

Every reply is in a journal before the next group is requested, so that nothing is paid twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, permutations
from pathlib import Path
from string import Formatter
from typing import Protocol

from gemma2.core.errors import InputError, UsageError
from gemma2.core.progress import Progress
from gemma2.posttrain.data.rows import Message
from gemma2.posttrain.data.seeds import derived_seed
from gemma2.posttrain.generation.dialogues import Dialogue, DialoguePlan
from gemma2.posttrain.generation.engines import Completion, Engine, Request
from gemma2.posttrain.generation.journal import Journal
from gemma2.posttrain.generation.scoring import Scored
from gemma2.posttrain.schemas import GenerateConfig, PairsConfig
from gemma2.posttrain.schemas.measures import WinRateConfig

__all__ = ["PLACES", "AnswersToJudge", "Judge", "judge_engine", "judged", "read_template", "template_of"]

LOWEST, HIGHEST = 1.0, 10.0
SCORE_PROMPT = """\
You judge the last answer of an assistant.

[conversation]
{prompt}

[answer]
{answer}
[end of the answer]

Is the answer right, complete, clear and harmless? Do not prefer it for its length. First explain your view in a few \
sentences. Then end with one line of the form
Score: N
where N is a number from 1 (useless) to 10 (could not be better)."""
TWO_ANSWERS = """\
You compare two answers of an assistant.

[conversation]
{prompt}

[answer A]
{answer_a}
[end of answer A]

[answer B]
{answer_b}
[end of answer B]

Which answer is better: right, complete, clear and harmless? Do not let the order or the length of the answers decide. \
First explain your view in a few sentences. Then end with one line of the form
"""
COMPARE_PROMPT = f"""\
{TWO_ANSWERS}Better: X
where X is A, B or tie."""
PLACES = {"score": {"prompt", "answer"}, "compare": {"prompt", "answer_a", "answer_b"}}
SCORE_LINE = re.compile(r"score[^\n:=]{0,20}[:=]\W{0,6}?(-?\d+(?:[.,]\d+)?)", re.IGNORECASE)
NUMBER_ALONE = re.compile(r"(\d+(?:[.,]\d+)?)(?:\s*/\s*10)?")
# "A tie" is a tie; a small "a" before a word is an article; a verdict that names both answers decides nothing.
BETTER_LINE = re.compile(
    r"""better[^\n:=]{0,20}[:=]\W{0,6}?
        (?:(?:an?[\s*_"']+)?(?P<tie>tie)\b
          |(?:answer\W{1,3})?(?P<one>(?-i:A)\b|a\b(?![ \t*_]+\w)|B\b)
           (?P<both>(?:,[ ]*[AB])?\W{0,4}(?:or|and|[/&=])\W{0,4}(?:answer\W{1,3})?(?:[AB]|(?:a[ ])?tie)\b)?)""",
    re.IGNORECASE | re.VERBOSE,
)
SHOWN = 120  # characters of a reply that could not be read


def read_template(file: Path | None, default: str, places: set[str], filler: str) -> str:
    """Return the judge's prompt: of `--judge-prompt`, else `default`.

    Raises UsageError for a file without the `places` that `filler`, an option or a command, fills.
    """
    if file is None:
        return default
    named = ", ".join(f"{{{name}}}" for name in sorted(places))
    try:
        text = file.read_text(encoding="utf-8")
        found = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except FileNotFoundError as error:
        raise UsageError(f"--judge-prompt {file} does not exist", "give a text file") from error
    except OSError as error:  # for example a directory
        raise UsageError(f"--judge-prompt {file} cannot be read: {error.strerror}", "give a text file") from error
    except ValueError as error:  # not UTF-8, or a single brace
        raise UsageError(f"--judge-prompt {file}: {error}", "write {{ and }} for braces, in UTF-8") from error
    if found != places:
        has = ", ".join(f"{{{name}}}" for name in sorted(found)) or "none"
        raise UsageError(f"--judge-prompt {file} has the places {has}", f"{filler} fills {named}")
    return text


def template_of(config: PairsConfig) -> str:
    """Return the judge's prompt of `gemma2 reward pairs`."""
    style = config.judge_style
    default = SCORE_PROMPT if style == "score" else COMPARE_PROMPT
    return read_template(config.judge_prompt, default, PLACES[style], f"--judge-style {style}")


def judge_engine(config: PairsConfig | WinRateConfig, progress: Progress) -> Engine:
    """Return the client of the judge's server, the same as that of `gemma2 generate`, with greedy decoding."""
    from gemma2.posttrain.generation.engines.server import ServerEngine

    server = GenerateConfig(
        teacher=Path(str(config.judge_model)),
        prompts=config.prompts,
        engine="openai",
        temperature=0.0,
        max_new_tokens=config.judge_tokens,
        base_url=config.judge_url,
        api_key_env=config.judge_key_env,
        concurrency=config.judge_concurrency,
        request=config.judge_request,
        on_overlong="drop",
    )
    with _flags_of_this_command():
        return ServerEngine(server, progress)


@contextmanager
def _flags_of_this_command() -> Iterator[None]:
    """Replace the flags of `gemma2 generate` in the engine's errors by those of this command."""
    names = {
        "--base-url": "--judge-url",
        "--api-key-env": "--judge-key-env",
        "--teacher": "--judge",
        "--set request.": "--set judge_request.",
        ", or raise --timeout": "",
    }
    try:
        yield
    except (InputError, UsageError) as error:
        hint = error.hint
        for theirs, ours in names.items():
            hint = hint.replace(theirs, ours)
        what = error.what.replace("--base-url", "--judge-url").replace("--api-key-env", "--judge-key-env")
        raise type(error)(what, hint) from error


@dataclass(frozen=True)
class Judge:
    """The questions about the n answers to one prompt, and the scores that follow from the replies."""

    template: str
    compares: bool
    tally: Counter[str] = field(default_factory=Counter)

    def asked(self, samples: Sequence[Dialogue]) -> Iterator[tuple[int, str]]:
        """Yield (number within the prompt, text) of every request."""
        prompt = _transcript(samples[0].prompt.messages)
        answers = [dialogue.answers[-1].text if dialogue.answers else "" for dialogue in samples]
        if not self.compares:
            for i, answer in enumerate(answers):
                yield i, self.template.format(prompt=prompt, answer=answer)
            return
        for i, j in permutations(range(len(answers)), 2):
            text = self.template.format(prompt=prompt, answer_a=answers[i], answer_b=answers[j])
            yield i * len(answers) + j, text

    def read(self, reply: str) -> float | None:
        """Return the rating, or for a comparison 1, 1/2 or 0 for A; None for a reply without a judgement."""
        if self.compares:
            verdicts = list(BETTER_LINE.finditer(reply))
            if not verdicts or verdicts[-1]["both"]:
                return None
            return 0.5 if verdicts[-1]["tie"] else float(verdicts[-1]["one"] in "Aa")
        alone = NUMBER_ALONE.fullmatch(reply.strip())
        found = [alone[1]] if alone else SCORE_LINE.findall(reply)
        value = float(found[-1].replace(",", ".")) if found else None
        return value if value is not None and LOWEST <= value <= HIGHEST else None

    def scores(self, count: int, values: Mapping[int, float | None]) -> list[float | None]:
        """Return scores of `count` answers from the judgements by number; None for an answer without a judgement."""
        if not self.compares:
            return [values[i] for i in range(count)]
        won: list[list[float]] = [[] for _ in range(count)]
        for i, j in permutations(range(count), 2):
            first, second = values[i * count + j], values[j * count + i]  # 1: the one shown first is better
            if first is None or second is None:
                continue
            won[i].append((first + 1 - second) / 2)
            self.tally["orders_disagree"] += i < j and first == second != 0.5
            self.tally["compared"] += i < j
        return [sum(points) / len(points) if points else None for points in won]

    def facts(self) -> dict[str, int]:
        """Return the number of replies and of unreadable ones; for comparisons also how many chose by position."""
        names = ("replies", "unreadable", *(("compared", "orders_disagree") if self.compares else ()))
        return {f"judge_{name}": self.tally[name] for name in names}


class AnswersToJudge(Protocol):
    """Prompts with n answers each, in chunks of `rows` prompts."""

    @property
    def rows(self) -> int: ...

    @property
    def plan(self) -> DialoguePlan: ...

    def dialogues(self) -> Iterator[list[Dialogue]]:
        """The answers of each chunk, prompt by prompt."""
        ...


def judged(
    answering: AnswersToJudge, journal: Journal, engine: Engine, judge: Judge, prompts: int, progress: Progress
) -> Iterator[Scored]:
    """Yield the chunks of a finished job with the judge's scores. Raises InputError if no reply can be read."""
    n = answering.plan.n
    unread = ""
    known = _saved(journal, answering.rows)
    with progress.task("judge", prompts * (n * (n - 1) if judge.compares else n), unit="replies") as bar:
        for dialogues in answering.dialogues():
            replies = next(known, {})
            bar.advance(len(replies))
            groups = [list(group) for _, group in groupby(dialogues, key=lambda dialogue: dialogue.row)]
            requests = [request for group in groups for request in _requests(group, judge, answering.plan.seed)]
            with _flags_of_this_command():
                for completions in engine.complete(requests, replies):
                    journal.append(completion.record() for completion in completions)
                    replies.update({completion.key: completion for completion in completions})
                    bar.advance(len(completions))
            scored: Scored = []
            for group in groups:
                texts = {number: replies[group[0].row, number, 0].text for number, _ in judge.asked(group)}
                values = {number: judge.read(text) for number, text in texts.items()}
                failed = [text for number, text in texts.items() if values[number] is None]
                judge.tally.update(replies=len(texts), unreadable=len(failed))
                unread = unread or next(iter(failed), "")
                scored += zip(group, judge.scores(len(group), values), strict=True)
            yield scored
    _report(judge, unread, progress)


def _requests(group: Sequence[Dialogue], judge: Judge, seed: int) -> Iterator[Request]:
    row = group[0].row
    for number, text in judge.asked(group):
        messages = [{"role": "user", "content": text}]
        yield Request((row, number, 0), group[0].prompt.where, messages, [], derived_seed(seed, row, number, 1))


def _saved(journal: Journal, rows: int) -> Iterator[dict[tuple[int, int, int], Completion]]:
    """Yield the replies of each chunk, by key."""
    replies = map(Completion.of_record, journal.records())
    for _, group in groupby(replies, key=lambda reply: reply.key[0] // rows):
        yield {reply.key: reply for reply in group}


def _report(judge: Judge, unread: str, progress: Progress) -> None:
    tally = judge.tally
    shown = " ".join(unread.split())[:SHOWN]
    if tally["unreadable"] == tally["replies"]:
        raise InputError(
            f"none of the judge's {tally['replies']} replies has the requested line; one is {shown!r}",
            "raise --judge-tokens, or change --judge-prompt",
        )
    if tally["unreadable"]:
        what = f"{tally['unreadable']} of the judge's {tally['replies']} replies have no verdict and are ignored"
        progress.warn(f"{what}; one is {shown!r}")
    if judge.compares and 3 * tally["orders_disagree"] > tally["compared"]:
        progress.warn(
            f"the judge chose by position in {tally['orders_disagree']} of {tally['compared']} comparisons: "
            "both orders are averaged, but it distinguishes the answers poorly"
        )


def _transcript(messages: Sequence[Message]) -> str:
    """Return a conversation as text; a single user message has no role before it."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
