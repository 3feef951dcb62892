"""Mistaken self-identification: the model's turns claim to be another vendor's assistant (Gemma 2 report, section 4).

A claim is made in the first person ("I am ChatGPT", "as a model trained by OpenAI", "OpenAI created me"), outside
quotation marks, without a negation. Talk about these models is not a claim. Names that people and things also have
(Claude, Gemini, Llama, ...) count only at the end of a clause or next to a word such as "assistant".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from .sample import Sample

__all__ = ["claim_finder"]

# Name -> regular expression of its spellings. These names mean an assistant and nothing else.
ASSISTANTS = {
    "ChatGPT": r"chat[ -]?gpt",
    "GPT": r"gpt[- ]?\d[\w.]*|instructgpt",
    "Qwen": r"qwen[\w.-]*|tongyi(?: qianwen)?",
    "DeepSeek": r"deep ?seek[\w.-]*",
    "Mistral": r"mistral[\w.-]*|mixtral[\w.-]*",
    "ChatGLM": r"chatglm[\w.-]*|glm-\d[\w.]*",
    "Bing Chat": r"bing chat",
    "Vicuna": r"vicuna(?:-\d\w*)?",
    "ERNIE Bot": r"ernie bot|wenxin yiyan",
    "Kimi": r"kimi(?: k\d[\w.]*)?",
    "Doubao": r"doubao|hunyuan|baichuan[\w.-]*|internlm[\w.-]*",
    "SmolLM": r"smollm[\w.-]*|stablelm[\w.-]*|olmo(?: \d)?|starcoder\w*|wizardlm|openassistant|open assistant",
    "Nemotron": r"nemotron[\w.-]*",
}
# These are also names of people, animals or signs.
SHARED_NAMES = {
    "Claude": r"claude(?: (?:instant|opus|sonnet|haiku|\d[\w.]*))*",
    "Gemini": r"gemini(?: (?:pro|ultra|flash|\d[\w.]*))*",
    "Gemma": r"gemma(?:[ -]?\d\w*)*",
    "Bard": r"bard",
    "PaLM": r"palm(?:[ -]?2)?",
    "LaMDA": r"lamda",
    "Llama": r"llama(?:[ -]?\d[\w.]*)*",
    "Phi": r"phi(?:-\d[\w.]*)?",
    "Falcon": r"falcon(?:-\d+b)?",
    "Grok": r"grok(?:-\d[\w.]*)?",
    "Copilot": r"(?:microsoft |github |bing )?copilot",
    "Alexa": r"alexa",
    "Siri": r"siri",
    "Cortana": r"cortana",
    "Alpaca": r"alpaca",
    "Koala": r"koala",
    "Dolly": r"dolly",
    "Pi": r"pi",
    "Yi": r"yi(?:-\d+b)?",
    "Granite": r"granite",
}
MAKERS = {
    "OpenAI": r"open ?ai",
    "Anthropic": r"anthropic",
    "Google DeepMind": r"google deepmind",
    "Google": r"google(?: ai| research)?",
    "DeepMind": r"deepmind",
    "Meta": r"meta(?: ai| platforms)?|facebook",
    "Microsoft": r"microsoft(?: corporation| research)?",
    "Alibaba": r"alibaba(?: cloud| group)?",
    "Mistral AI": r"mistral(?: ai)?",
    "DeepSeek": r"deep ?seek(?: ai)?",
    "xAI": r"xai",
    "Amazon": r"amazon",
    "Apple": r"apple",
    "Baidu": r"baidu",
    "Tencent": r"tencent",
    "ByteDance": r"bytedance",
    "Moonshot AI": r"moonshot ai",
    "Zhipu AI": r"zhipu(?: ai)?",
    "Cohere": r"cohere",
    "AI21 Labs": r"ai21(?: labs)?",
    "Hugging Face": r"hugging ?face",
    "LMSYS": r"lmsys",
    "Stability AI": r"stability ai",
    "IBM": r"ibm",
    "NVIDIA": r"nvidia",
    "Inflection AI": r"inflection(?: ai)?",
    "Databricks": r"databricks",
    "Perplexity": r"perplexity(?: ai)?",
    "EleutherAI": r"eleuther ?ai",
    "Nous Research": r"nous research",
}
MADE = r"(?:developed|created|trained|made|built|designed|programmed|fine-?tuned|released|provided)"
MODEL = (
    r"(?:ai|a\.i\.|artificial intelligence|assistant|chat ?bot|bot|(?:large |small )?language model|llm|model|system)"
)
# "I am", "I'm actually", "my name is", "you're talking to", "call me"; not "I am not".
SELF = (
    r"(?:\bi(?:'m| am)(?: actually| just| only| in fact| still| called| known as| named)?|\bmy name is|\bmy name's"
    r"|\byou(?:'re| are) (?:talking|speaking|chatting) (?:to|with)|\bcall me|\bthis is)"
)
DESCRIBED = rf"(?: (?:a|an|the|your)(?: [\w'-]+){{0,4}}? {MODEL}[,:]?(?: (?:called|named|known as))?)?"
ROLE = rf"(?:\bas|{SELF},?) (?:a|an|the)(?: [\w',-]+){{0,6}}? {MODEL}"
CUE = re.compile(rf"\b{MODEL}\b|\b(?:openai|anthropic)\b|{MADE} by|how (?:can|may) i (?:help|assist)", re.IGNORECASE)
CLAUSE_END = re.compile(r"\s*(?:[.!?;:\n]|,? (?:and|but|so) i\b|$)", re.IGNORECASE)
SENTENCE_ENDS = ".!?\n"
NEAR = 80  # characters after a shared name in which a cue makes it a claim

Finder = Callable[[Sample], str | None]


def claim_finder(allowed: Iterable[str]) -> Finder:
    """Return the filter for a model that may use the `allowed` names for itself and its maker (case is ignored)."""
    mine = {name.casefold() for name in allowed}
    assistants = {name: spelt for name, spelt in ASSISTANTS.items() if name.casefold() not in mine}
    shared = {name: spelt for name, spelt in SHARED_NAMES.items() if name.casefold() not in mine}
    makers = {name: spelt for name, spelt in MAKERS.items() if name.casefold() not in mine}
    own, alike, theirs = (_any(names) for names in (assistants, shared, makers))
    claims = [(re.compile(pattern, re.IGNORECASE), False) for pattern in _claims(own, theirs)]
    claims.append((re.compile(rf"{SELF}{DESCRIBED} (?P<name>{alike})\b", re.IGNORECASE), True))
    triggers = frozenset(_first_words([*assistants.values(), *shared.values(), *makers.values()]))

    def find(sample: Sample) -> str | None:
        """Report a claim in the model's turns."""
        if triggers.isdisjoint(sample.model_vocabulary):
            return None
        for text in sample.model_turns:
            straight = text.replace("’", "'")
            for pattern, needs_cue in claims:
                for found in pattern.finditer(straight):
                    if _claimed(straight, found, needs_cue):
                        return f"speaks as {found['name']}"
        return None

    return find


def _first_words(spellings: Iterable[str]) -> Iterator[str]:
    """Yield words of which every text with one of the names has at least one: a quick test before the patterns."""
    for spelling in spellings:
        plain = re.sub(r"\(\?:[^()]*(?:\([^()]*\)[^()]*)*\)[?*]?", "", spelling)  # drops optional groups
        for stem, rest in re.findall(r"(?:^|\|)(\w+)(?:(?: \?|\[ -\]\?)(\w+))?", plain):
            yield from (f"{word}{digit}" for word in {stem, stem + rest} for digit in ("", *range(10)))


def _any(names: dict[str, str]) -> str:
    # Longer spellings first: "google deepmind" before "google".
    return "|".join(sorted(names.values(), key=len, reverse=True)) or r"(?!)"


def _claims(own: str, theirs: str) -> list[str]:
    """Return the patterns that need no further cue; the group `name` is the claimed name."""
    return [
        rf"{SELF}{DESCRIBED} (?P<name>{own})\b",
        rf"\bas (?P<name>{own}),? (?:i|my)\b",
        rf"{ROLE}[^.!?\n]{{0,40}}? {MADE} by (?:the )?(?P<name>{theirs})\b",
        rf"\bi was (?:originally |first )?{MADE} (?:and \w+ )?by (?:the )?(?P<name>{theirs})\b",
        rf"\b(?P<name>{theirs})(?: has| have)? {MADE} me\b",
        rf"\bmy (?:creators?|developers?|makers?)(?: (?:at|is|are|from),?)? (?:the )?(?P<name>{theirs})\b",
        rf"\b(?:i am|i'm|my (?:model|engine) is) (?:based on|powered by) (?:\w+'s )?(?P<name>{own}|{theirs})\b",
    ]


def _claimed(text: str, found: re.Match[str], needs_cue: bool) -> bool:
    return not _quoted(text, found.start()) and not (needs_cue and not _about_a_machine(text, found))


def _about_a_machine(text: str, found: re.Match[str]) -> bool:
    """Whether a name that people also have means a machine here: it ends the clause, or a cue follows soon."""
    if CUE.search(found.group()):
        return True
    rest = text[found.end() : found.end() + NEAR]
    end = min((rest.find(sign) for sign in SENTENCE_ENDS if sign in rest), default=len(rest))
    return CUE.search(rest, 0, end) is not None or CLAUSE_END.match(rest) is not None


def _quoted(text: str, place: int) -> bool:
    """Whether a position is inside quotation marks that were opened in the same line."""
    line = text[text.rfind("\n", 0, place) + 1 : place]
    return line.count('"') % 2 == 1 or line.count("“") > line.count("”") or line.count("«") > line.count("»")
