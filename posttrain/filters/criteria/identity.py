"""Mistaken self-identification: the model's turns claim to be another vendor's assistant (Gemma 2 report, section 4).

A claim is made in the first person ("I am ChatGPT", "I'm an OpenAI language model", "OpenAI created me"), outside
quotation marks, without a negation or an "if". Talk about these models is not a claim, nor is a person's job. Names
that people and things also have (Claude, Gemini, Llama, ...) count only next to a word such as "assistant", or where
the turn ends with them. English in detail; other languages by their usual introductions (`assistants.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from .assistants import (
    ASSISTANTS,
    ELSEWHERE,
    INTRODUCTIONS,
    MACHINE_ELSEWHERE,
    MADE_ELSEWHERE,
    MAKERS,
    NAME_ENDS,
    ONLY_AI,
    SHARED_NAMES,
)
from .sample import Sample, quoted

__all__ = ["claim_finder"]

MADE = r"(?:developed|created|trained|made|built|designed|programmed|fine-?tuned|released|provided)"
MODEL = (
    r"(?:ai|a\.i\.|artificial intelligence|assistant|chat ?bot|bot|(?:large |small )?language model|llm|model|system)"
)
# "I am", "I'm actually", "my name is", "you're talking to", "call me"; not "I am not".
SELF = (
    r"(?:\bi(?:'m| am)(?: actually| just| only| in fact| still| called| known as| named)?|\bmy name is|\bmy name's"
    r"|\byou(?:'re| are) (?:talking|speaking|chatting) (?:to|with)|\bcall me|\bi go by|\bthis is"
    r"|\bthe (?:model|assistant|ai) (?:that )?you(?:'re| are) (?:using|talking to|speaking with)(?: now| here)? is)"
)
DESCRIBED = rf"(?: (?:a|an|the|your)(?: [\w'-]+){{0,4}}? {MODEL}[,:]?(?: (?:called|named|known as))?)?"
ROLE = rf"(?:\bas|{SELF},?) (?:a|an|the)(?: [\w',-]+){{0,6}}? {MODEL}"
# The model itself, not an "AI engineer" or a "system administrator".
NOUN_ENDS = (
    r"(?=\s*(?:[.,;:!?)\n]|$)| (?:and|that|who|which|so|with|but|from|by|in|here|trained|made|built|designed)\b)"
)
MACHINE = re.compile(
    r"\b(?:ai|a\.i\.|artificial intelligence|language model|llm|chat ?bot|virtual assistant|open model)\b"
    r"(?! (?:engineer|researcher|student|expert|artist|ethic))"
    r"|\bassistants?\b(?! (?:manager|professor|director|coach|to the|editor|teacher|chef))"
    rf"|\b(?:openai|anthropic|xai)\b|{MADE} by|how (?:can|may) i (?:help|assist)|i can help|{MACHINE_ELSEWHERE}",
    re.IGNORECASE,
)
HYPOTHETICAL = re.compile(
    r"\b(?:if|suppose|imagine|assum\w+|pretend\w*|whether|like|unless|(?:never|not|don't|didn't|wasn't)"
    r" (?:sa(?:y|id)|claim\w*|think|believe|mean))(?: that)?,?\s*$",
    re.IGNORECASE,
)
# Somebody whom a company trained for a job.
TRADE = r"(?! (?:as|to be) an? (?!(?:[\w-]+ ){0,3}(?:ai|assistant|model|bot|chatbot)\b))"
NEAR = 80  # characters after a shared name in which a cue makes it a claim
LAST = re.compile(r"\W*$")

Finder = Callable[[Sample], str | None]


def claim_finder(allowed: Iterable[str]) -> Finder:
    """Return the filter for a model that may use the `allowed` names for itself and its maker (case is ignored)."""
    mine = {name.casefold() for name in allowed}
    assistants, shared, makers = (
        {name: spelt for name, spelt in names.items() if name.casefold() not in mine}
        for names in (ASSISTANTS, SHARED_NAMES, MAKERS)
    )
    own, alike, theirs = (_any(names) for names in (assistants, shared, makers))
    only_ai = _any({name: spelt for name, spelt in makers.items() if name in ONLY_AI})
    english = [(re.compile(pattern, re.IGNORECASE), False) for pattern in _claims(own, theirs, only_ai)]
    english.append((re.compile(rf"{SELF}{DESCRIBED} (?P<name>{alike})\b", re.IGNORECASE), True))
    elsewhere = [(re.compile(pattern, re.IGNORECASE), False) for pattern in _claims_elsewhere(own, theirs)]
    elsewhere.append((re.compile(rf"(?:{INTRODUCTIONS}) ?(?P<name>{alike}){NAME_ENDS}", re.IGNORECASE), True))
    words = set(_first_words([*assistants.values(), *shared.values(), *makers.values()]))
    triggers = frozenset(word for word, second in words if not second)
    pairs = [(word, second) for word, second in words if second]

    def find(sample: Sample) -> str | None:
        """Report a claim in the model's turns."""
        said = sample.model_vocabulary
        if triggers.isdisjoint(said) and not any(word in said and second in said for word, second in pairs):
            return None
        for text in sample.model_turns:
            straight = text.replace("’", "'")
            others = not straight.isascii() or not ELSEWHERE.isdisjoint(said)
            for pattern, needs_cue in [*english, *elsewhere] if others else english:
                for found in pattern.finditer(straight):
                    if _claimed(straight, found, needs_cue):
                        return f"speaks as {found['name']}"
        return None

    return find


def _first_words(spellings: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield words of which every text with one of the names has at least one: a quick test before the patterns.

    The second word, where it is not empty, must be in the text too: "open" and "ai".
    """
    for spelling in spellings:
        spelling = re.sub(r"[\u3040-\u9fff]+", lambda han: han.group()[0], spelling)  # every sign is a word there
        plain = re.sub(r"\(\?:[^()]*(?:\([^()]*\)[^()]*)*\)[?*]?", "", spelling)  # drops optional groups
        for stem, space, rest in re.findall(r"(?:^|\|)(\w+)(?:( \??|\[ -\]\?)(\w+))?", plain):
            if not space or space.endswith("?"):
                yield from ((f"{stem}{rest}{digit}", "") for digit in ("", *range(10)))
            if space:
                yield stem, rest


def _any(names: dict[str, str]) -> str:
    # Longer spellings first: "google deepmind" before "google".
    return "|".join(sorted(names.values(), key=len, reverse=True)) or r"(?!)"


def _claims(own: str, theirs: str, only_ai: str) -> list[str]:
    """Return the patterns that need no further cue; the group `name` is the claimed name."""
    team = r"(?:the |a )?(?:(?:team|researchers|engineers|people|scientists|experts)(?: \w+)? (?:at|of|from) )?"
    return [
        rf"{SELF}{DESCRIBED} (?P<name>{own})\b(?!'s)",
        rf"\b(?:speaking )?as (?P<name>{own}),? (?:i|my)\b",
        rf"(?:\bas|{SELF},?) an? (?P<name>{theirs})(?:'s)?(?: [\w'-]+){{0,2}}? {MODEL}{NOUN_ENDS}",
        rf"{ROLE}[^.!?\n]{{0,40}}? {MADE} by {team}(?P<name>{theirs})\b",
        rf"{ROLE},? (?:by|from) {team}(?P<name>{theirs})\b",
        rf"\bi was (?:originally |first )?{MADE} (?:and \w+ )?by {team}(?P<name>{theirs})\b{TRADE}",
        rf"\b(?P<name>{theirs})(?:, [^.,!?\n]{{0,40}}?)?(?: that| which| who)?(?: has| have)? {MADE} me\b(?! an? )",
        rf"\bmy (?:creators?|developers?|makers?)(?: (?:at|is|are|from),?)? (?:the )?(?P<name>{theirs})\b",
        rf"\bi (?:come|came) from (?P<name>{only_ai})\b",
        rf"\b(?:i am|i'm|my (?:model|engine) is) (?:based on|powered by) (?:\w+'s )?(?P<name>{own}|{theirs})\b",
    ]


def _claims_elsewhere(own: str, theirs: str) -> list[str]:
    made = [pattern.replace("MAKER", rf"(?P<name>{theirs})") for pattern in MADE_ELSEWHERE]
    return [rf"(?:{INTRODUCTIONS}) ?(?P<name>{own}){NAME_ENDS}", *made]


def _claimed(text: str, found: re.Match[str], needs_cue: bool) -> bool:
    if quoted(text, found.start()) or HYPOTHETICAL.search(text[max(0, found.start() - 30) : found.start()]):
        return False
    return not needs_cue or _about_a_machine(text, found)


def _about_a_machine(text: str, found: re.Match[str]) -> bool:
    """Whether a name that people also have means a machine here: a cue is near, or nothing follows it."""
    if MACHINE.search(found.group()):
        return True
    return (
        MACHINE.search(text, found.end(), found.end() + NEAR) is not None or LAST.match(text, found.end()) is not None
    )
