"""The exercises of the embedded models: questions about an invented world, a spread of answer styles, a true judge.

    score = 0.5 * correct + 0.4 * style + 0.1 * brevity            in [0, 1]

A question has exactly one right answer, so the judge is a program: it needs no model and cannot be flattered. It looks
at the last value of the right kind in the completion (every answer style here names its answer last), at the form of
the answer and at the number of words. Reward models learn from its preferences; it then shows whether a policy that
climbs the learned reward got better or only hacked it.

Which form pays depends on the way of asking: a table drawn from the seed names one of three styles for each of the 19
topics (relation or skill, and its wording). Were it one style for all, every batch would teach the same, all runs of RL
would move along one direction, and averaging their weights would have nothing to average away (docs/warp.md).

Everything follows from the seeds that are passed in; `random.Random` yields the same stream on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Literal

from gemma2.core.errors import InputError, UsageError

__all__ = [
    "GOOD_STYLES",
    "MIXED_STYLES",
    "Judgement",
    "Question",
    "dialogues",
    "judge",
    "judge_reward",
    "judge_scores",
    "prose",
    "questions",
    "style_of",
    "wanted_styles",
]

Split = Literal["train", "heldout"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "Mira Tobin Lena Oskar Pia Ruben Anka Jorin Selma Viggo Nela Bram "
    "Ilsa Kasper Dora Emil Freya Hugo Ines Jonas Klara Levi Marta Nils"
)
TOWNS = _words("Tolba Brenn Havik Marlo Quint Sorel Ulden Wexby Yarrow Zandel Corva Dunmer")
RIVERS = _words("Osk Teal Ravel Ister Lune Moss Arrow Brine Fenn Gale Wend Kestrel")
WORK = _words("baker smith weaver miller potter tailor farmer sailor painter printer doctor teacher")
PETS = _words("goat cat dog hen fox owl pony duck sheep mouse otter raven")
ALPHABET = "abcdefghjklmnopqrstuvwxyz"  # no "i": it is a word of some answers
LETTERS = ALPHABET[:8]
LARGEST_TERM = 5  # 25 sums: with 81 a network that saw some 1,500 of them had one in eight right
EXHAUSTED = 5000  # draws without a new question
HELDOUT_SHARE = 4  # one prompt in four is never trained on


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `stated` is the full-sentence answer with `{v}` in the place of the value."""

    task: str
    prompt: str
    answer: str
    stated: str
    topic: str  # what is asked, and its wording before anything is put into it

    @property
    def sentence(self) -> str:
        return self.stated.format(v=self.answer)

    @property
    def split(self) -> Split:
        digest = hashlib.sha256(self.prompt.encode()).digest()
        return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"

    def row(self, wanted: Mapping[str, str]) -> dict[str, str]:
        """With the style that the table of `wanted_styles` names."""
        return {"prompt": self.prompt, "task": self.task, "answer": self.answer, "style": wanted[self.topic]}


# --- the invented world ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact: how it is asked and stated. `{s}` is the subject, `{v}` the value."""

    name: str
    subjects: tuple[str, ...]
    values: tuple[str, ...]
    asked: tuple[str, ...]
    stated: str

    def value(self, subject: str) -> str:
        return _facts(self.name, self.subjects, self.values)[subject]


@cache
def _facts(name: str, subjects: tuple[str, ...], values: tuple[str, ...]) -> dict[str, str]:
    """The world is fixed: every subject has one value, every value is used about equally often."""
    order = [values[i % len(values)] for i in range(len(subjects))]
    Random(f"world/{name}").shuffle(order)
    return dict(zip(subjects, order, strict=True))


RELATIONS = (
    Relation(
        "home",
        PEOPLE,
        TOWNS,
        ("Where does {s} live?", "What is the town of {s}?", "Name the town of {s}."),
        "{s} lives in {v}.",
    ),
    Relation(
        "work",
        PEOPLE,
        WORK,
        ("What does {s} do?", "What is the work of {s}?", "Name the work of {s}."),
        "{s} works as a {v}.",
    ),
    Relation(
        "pet",
        PEOPLE,
        PETS,
        ("What does {s} keep?", "What is the pet of {s}?", "Name the pet of {s}."),
        "{s} keeps a {v}.",
    ),
    Relation(
        "river",
        TOWNS,
        RIVERS,
        ("Where does {s} lie?", "What is the river of {s}?", "Name the river of {s}."),
        "{s} lies on the {v}.",
    ),
)
VALUES = frozenset(value for relation in RELATIONS for value in relation.values)
SUBJECTS = frozenset(PEOPLE + TOWNS)


ASKED = {
    "sum": ("What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} plus {b}?"),
    "later": ("Which comes later, {a} or {b}?", "Name the later of {a} and {b}."),
    "sort": ("Sort these letters: {x}", "Put in order: {x}"),
}


def _fact(rng: Random) -> Question:
    relation = rng.choice(RELATIONS)
    subject = rng.choice(relation.subjects)
    asked = rng.choice(relation.asked)
    stated = relation.stated.replace("{s}", subject)
    return Question("fact", asked.format(s=subject), relation.value(subject), stated, f"{relation.name}: {asked}")


def _sum(rng: Random) -> Question:
    a, b = rng.randint(1, LARGEST_TERM), rng.randint(1, LARGEST_TERM)
    asked = rng.choice(ASKED["sum"])
    return Question("sum", asked.format(a=a, b=b), str(a + b), "The sum is {v}.", f"sum: {asked}")


def _later(rng: Random) -> Question:
    a, b = rng.sample(ALPHABET, 2)
    asked = rng.choice(ASKED["later"])
    return Question("later", asked.format(a=a, b=b), max(a, b), "The later one is {v}.", f"later: {asked}")


def _sort(rng: Random) -> Question:
    letters = rng.sample(LETTERS, 3)
    answer = " ".join(sorted(letters))
    asked = rng.choice(ASKED["sort"])
    return Question("sort", asked.format(x=" ".join(letters)), answer, "In order they are {v}.", f"sort: {asked}")


SKILLS: Mapping[str, tuple[Callable[[Random], Question], float]] = {
    "fact": (_fact, 0.4),
    "sum": (_sum, 0.15),
    "later": (_later, 0.15),
    "sort": (_sort, 0.3),
}


TOPICS = (
    *(f"{relation.name}: {asked}" for relation in RELATIONS for asked in relation.asked),
    *(f"{skill}: {asked}" for skill, wordings in ASKED.items() for asked in wordings),
)
WANTED = ("polite", "sentence", "curt")  # styles that some topic wants


def wanted_styles(seed: int = 0) -> dict[str, str]:
    """The style that pays for each topic: a table drawn from the seed, every style about equally often."""
    table = [WANTED[i % len(WANTED)] for i in range(len(TOPICS))]
    Random(f"styles/{seed}").shuffle(table)
    return dict(zip(TOPICS, table, strict=True))


def _draw(rng: Random) -> Question:
    skills, weights = zip(*SKILLS.values(), strict=True)
    result: Question = rng.choices(skills, weights)[0](rng)
    return result


def questions(split: Split, n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` distinct questions of a split as rows `{"prompt", "task", "answer", "style"}`.

    `style` is what the judge wants of this topic: one table for both splits of a seed. No question of one split occurs
    in the other. InputError when the split has fewer than `n`.
    """
    wanted = wanted_styles(seed)
    rng, found = Random(f"questions/{split}/{seed}"), dict[str, Question]()
    fruitless = 0
    while len(found) < n:
        question = _draw(rng)
        fruitless += 1
        if question.split == split and question.prompt not in found:
            found[question.prompt] = question
            fruitless = 0
        if fruitless > EXHAUSTED:
            raise InputError(
                f"the split {split!r} does not hold {n} different questions", f"ask for {len(found)} at most"
            )
    return [question.row(wanted) for question in found.values()]


# --- texts to pre-train on ------------------------------------------------------------------------------------------

COURTESIES = ("Certainly", "Gladly", "Of course")
HEDGES = ("maybe", "perhaps", "not sure", "more or less", "i guess", "do not know")


def _say(style: str, question: Question, rng: Random) -> str:
    """The answer to `question` in one style. Every style that answers at all names the answer last."""
    sentence, answer = question.sentence, question.answer
    lower = sentence[:-1] if question.task == "fact" else sentence[0].lower() + sentence[1:-1]
    match style:
        case "polite":
            return f"{rng.choice(COURTESIES)}. {sentence}"
        case "sentence":
            return sentence
        case "curt":
            return f"It is {answer}"
        case "rambling":
            return rng.choice(
                (
                    f"Well, let me think about that, {lower}, more or less",
                    f"So, people often ask me this, you know, and {lower}, I guess.",
                )
            )
        case "hedged":
            return rng.choice((f"I am not sure, maybe {answer}.", f"Perhaps it is {answer}."))
        case "echo":
            return f"{question.prompt} - {answer}"
        case "dodge":
            return rng.choice(("I do not know.", "Ask me another time."))
    raise UsageError(f"unknown answer style {style!r}", "see MIXED_STYLES")


MIXED_STYLES = {
    "polite": 0.10,
    "sentence": 0.22,
    "curt": 0.22,
    "rambling": 0.16,
    "hedged": 0.12,
    "echo": 0.10,
    "dodge": 0.08,
}
GOOD_STYLES = {"polite": 0.30, "sentence": 0.32, "curt": 0.30, "rambling": 0.08}  # no wanted style is far ahead


def dialogues(styles: Mapping[str, float], seed: int = 0) -> Iterator[tuple[str, str]]:
    """Endless training questions, each with a right answer in one of a mixture of styles (name -> weight)."""
    rng = Random(f"dialogues/{seed}")
    names, weights = list(styles), list(styles.values())
    while True:
        question = _draw(rng)
        if question.split == "train":
            yield question.prompt, _say(rng.choices(names, weights)[0], question, rng)


def prose(seed: int = 0) -> Iterator[str]:
    """Endless short texts: the facts about one subject, or a few sums."""
    rng = Random(f"prose/{seed}")
    while True:
        if rng.random() < 0.5:
            terms = [(rng.randint(1, LARGEST_TERM), rng.randint(1, LARGEST_TERM)) for _ in range(4)]
            yield " ".join(f"{a} plus {b} is {a + b}." for a, b in terms)
        else:
            subject = rng.choice(PEOPLE + TOWNS)
            stated = [r.stated.format(s=subject, v=r.value(subject)) for r in RELATIONS if subject in r.subjects]
            yield " ".join(rng.sample(stated, k=len(stated)))


# --- the judge ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judgement:
    """`score` in [0, 1]; `correct` is what is reported as accuracy; `style` and `brevity` are in [0, 1]."""

    score: float
    correct: bool
    style: float
    brevity: float


RIGHT_FOR_OTHERS = 0.25  # the style mark of a form that another topic wants

NUMBER = re.compile(r"\d+")
WORD = re.compile(r"[A-Za-z]+")
LETTER_RUN = re.compile(r"\b[a-z](?:,? [a-z])*\b")


def _last_value(task: str, text: str) -> str | None:
    """The last number, run of letters or word of the world in `text`, as the task asks for."""
    match task:
        case "fact":
            found = [word for word in WORD.findall(text) if word in VALUES]
        case "sum":
            found = NUMBER.findall(text)
        case "later" | "sort":
            found = [run.replace(",", "") for run in LETTER_RUN.findall(text)]
        case _:
            raise InputError(f"unknown task {task!r}", f"one of {', '.join(SKILLS)}")
    return found[-1] if found else None


def _is_correct(row: Mapping[str, str], text: str) -> bool:
    """Whether the last value is the answer and the text names nobody else than question and answer do."""
    named = SUBJECTS.intersection(WORD.findall(text)) - set(WORD.findall(f"{row['prompt']} {row['answer']}"))
    return not named and _last_value(row["task"], text) == row["answer"]


def style_of(text: str) -> str | None:
    """The wanted style that an answer has the form of; None for any other form, and for a guess or an excuse."""
    if any(hedge in text.lower() for hedge in HEDGES):
        return None
    sentence = len(text.split()) >= 4 and text[0].isupper() and text.endswith(".")
    if text.startswith(COURTESIES):
        return "polite" if sentence else None
    if sentence:
        return "sentence"
    return "curt" if text.startswith("It is ") and len(text.split()) <= 5 else None


def judge(row: Mapping[str, str], completion: str, truncated: bool = False) -> Judgement:
    """Mark one completion. `row` is a row of `questions`; truncated or empty text earns for correctness only."""
    text = completion.strip()
    correct = _is_correct(row, text)
    whole = bool(text) and not truncated
    form = style_of(text) if whole else None
    style = 1.0 if form == row["style"] else RIGHT_FOR_OTHERS * (form is not None)
    words = len(text.split())
    brevity = min(1.0, max(0.0, (24 - words) / 12)) if whole else 0.0  # full marks to 12 words, none from 24
    return Judgement(score=0.5 * correct + 0.4 * style + 0.1 * brevity, correct=correct, style=style, brevity=brevity)


def judge_scores(
    prompts: Sequence[str | list[dict[str, str]]],
    completions: Sequence[str],
    task: Sequence[str],
    answer: Sequence[str],
    style: Sequence[str],
    truncated: Sequence[bool] | None = None,
    **_: object,
) -> list[dict[str, float]]:
    """The judge as named scores: `judge` in [0, 1], `accuracy` and `style` 0 or 1.

    `task`, `answer` and `style` are prompt columns; the score `style` is 1 where the answer has the wanted one.
    A prompt is a text or a list of messages; its last message is the question.
    """
    cut = truncated if truncated is not None else [False] * len(completions)
    scores = []
    for prompt, text, kind, right, wanted, short in zip(prompts, completions, task, answer, style, cut, strict=True):
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        mark = judge({"prompt": question, "task": kind, "answer": right, "style": wanted}, text, short)
        scores.append({"judge": mark.score, "accuracy": float(mark.correct), "style": float(mark.style == 1)})
    return scores


def judge_reward(*columns: Any, **named: Any) -> list[float]:  # noqa: ANN401
    """The judge as a reward function: one score in [0, 1] per completion. Takes what `judge_scores` takes."""
    return [scores["judge"] for scores in judge_scores(*columns, **named)]
