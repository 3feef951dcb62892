"""Refusals and disclaimers: what assistants say instead of an answer, or about themselves.

A refusal opens a turn and is said by the model in its own voice: "I can't help with that". The same words also occur in
letters ("I'm unable to attend"), stories ("I won't go, said the knight"), quotations, praise ("I can't recommend it
enough") and proofs ("I cannot give a shorter one"); so a pattern names the verb and, where the verb is common, what
follows it. English in detail; fourteen more languages by their usual formulas. A refusal in other words is missed.
"""

from __future__ import annotations

import re

from .sample import Sample, quoted, words_of

__all__ = ["disclaimer", "is_refusal"]

OPENING = 200  # characters at the start of a turn that are searched for a refusal
# can't, and what follows it in a refusal. HELP needs no object; GIVE needs one that is not "a better example".
CANNOT = r"(?:can't|cannot|can not|won't|will not|(?:am|'m) (?:unable|not able) to|won't be able to)"
NOT_MAY = r"(?:am|'m) (?:not allowed|not permitted|not programmed|not designed|not going) to"
HELP = (
    r"(?:help|assist)(?: (?:you|anyone|anybody|people))?"
    r"(?: (?:with|in|to|do|make|break|write|find|plan|on)\b|(?=\s*[.!,;?]|\s*$))"
    r"|comply\b|condone\b|fulfil(?:l)?\b|engage in\b|participate in\b|take (?:part|sides)\b|browse\b|access\b"
    r"|do (?:that|this|so|it for you)\b|in good conscience\b|answer (?:that|this|the|your|questions)\b"
)
GIVE = (
    r"(?:provide|offer|share|give|write|create|generate|produce|discuss|support|answer|verify|confirm|look up"
    r"|tell you how)"
    r"(?=[ .!,])(?! (?:to|him|her|them|all|my|a (?:better|shorter|nicer|clearer|simpler|more|finer)|away|up|in\b))"
)
SEE = r"see (?:your|today|(?:the |any )?(?:images?|pictures?|photos?|files?|attachments?|screens?)\b)"
RATHER = r"(?:say|answer|comment|do (?:that|this)|discuss (?!my)|write (?:that|this)|go into)"
REFUSES = "|".join(
    [
        rf"\bi ?{CANNOT} (?:{HELP}|{GIVE}|{SEE})",
        rf"\bi ?{NOT_MAY} (?:{HELP}|{GIVE})",
        rf"^(?:(?:i'm |i am )?(?:so |very |really |truly )?(?:sorry|afraid)|apologies|unfortunately|no|i apologi[sz]e)"
        rf"[,.!;:]? (?:but |that )?(?:[^.!?\n]{{0,30}}? )?i ?(?:{CANNOT} (?:{HELP}|{GIVE}|{SEE}|recall)|must decline)",
        r"\b(?:something|what|one) (?:that )?i (?:can't|cannot|won't) (?:help|assist|do|provide|answer)",
        r"\bnot something (?:that )?i(?:'m| am| can| will)? (?:able to |willing to |going to )?"
        r"(?:help|assist|do|provide|answer)",
        r"\bi (?:have to|must|need to|politely|respectfully)? ?(?:refuse|decline)"
        r"(?: to (?:answer|help|assist|write|provide|engage|do|discuss|comply|comment|say)"
        r"|(?: (?:this|that|your) \w+)?[.,;!]|$)",
        rf"\bi(?:'d| would) (?:rather not|prefer not to) {RATHER}",
        r"\bi(?:'m| am) not comfortable (?:answering|with|writing|discussing|providing|helping|sharing|doing)\b",
        r"\b(?:not appropriate|inappropriate) for me to\b",
        r"\bmy (?:guidelines|policies|programming|rules) (?:do not|don't) (?:allow|permit)\b",
        r"\bagainst my (?:guidelines|policies|programming|principles|rules)\b",
        r"\bwould be (?:\w+ )?(?:unsafe|unethical|harmful|illegal|irresponsible|inappropriate|dangerous|wrong)\b"
        r"[^.!?\n]{0,12}\bi (?:won't|can't|cannot|will not|must)",
        # A limit of knowledge or means.
        r"\bi (?:do not|don't) know"
        r"(?: (?:who|what|when|where|which|how|whether|if|why|that|anything|enough)\b|[.,;!]|$)",
        r"\bi (?:do not|don't) have "
        r"\bi (?:do not|don't) have "
        r"(?:any |enough |sufficient |specific |reliable |up-to-date |real-time |current |personal ){0,3}"
        r"(?:information|data|knowledge|details|records?|opinions?|experiences?)\b",
        r"\bi (?:do not|don't) have (?:direct |real-time )?(?:access to|the ability to)\b"
        r"|\bi have no (?:information|access|knowledge)\b",
        r"\bi(?:'m| am) (?:not aware of any|not familiar with|unable to (?:verify|confirm|find|browse|access))\b",
        r"\bi (?:cannot|can't) recall\b",
    ]
)
ELSEWHERE = "|".join(
    [
        r"das kann ich (?:\w+ )?nicht (?:beantworten|tun|sagen)",
        r"kann ich (?:dir|ihnen|euch)?(?: \w+){0,3} ?nicht helfen",
        r"ich kann (?:dir|ihnen|euch)?(?: \w+){0,4} ?nicht (?:helfen|weiterhelfen|beantworten)",
        r"je ne (?:peux|suis) pas (?:vous |t'|te |en mesure |répondre|fournir|aider|autorisé)",
        r"no puedo (?:ayudar|proporcionar|responder|cumplir|ofrecer|hacer eso)",
        r"non posso (?:aiutar|fornire|rispondere|soddisfare|farlo)",
        r"não posso (?:ajud|fornecer|responder|cumprir|fazer isso)",
        r"kan ik (?:je|u|jullie)?(?: \w+){0,2} ?niet (?:mee |bij )?helpen|ik kan (?:je|u)?(?: \w+){0,3} ?niet helpen",
        r"nie mogę (?:\w+ )?(?:w tym )?(?:pomóc|odpowiedzieć|podać|udzielić|spełnić)",
        r"я не (?:могу|буду) (?:\w+ )?(?:помочь|помогать|ответить|отвечать|предоставить|выполнить)",
        r"我(?:无法|不能|没办法)(?:帮助|协助|提供|回答|满足|完成|为您|为你)",
        r"(?:お応え|お答え|お手伝い|ご協力|お力添え)(?:することが)?(?:は)?(?:でき|いたしかね)(?:ません)?",
        r"(?:도와드릴|도와 드릴|답변드릴|제공할|답변할) 수 (?:가 )?없",
        r"(?:yardımcı olamam|yardım edemem|cevap veremem|yanıt veremem)",
        r"لا (?:أستطيع|يمكنني) (?:المساعدة|مساعدتك|تقديم|الإجابة)",
        r"मदद नहीं कर सकत",
    ]
)
REFUSAL = re.compile(f"{REFUSES}|{ELSEWHERE}", re.IGNORECASE)
# Every refusal has one of these; a quick test before the patterns.
SOMEBODY = re.compile(
    r"\b(?:i|me|my|ich|je|puedo|posso|ik)\b|[^\x00-\xff]|mogę|não|olamam|edemem|veremem", re.IGNORECASE
)
# A letter, or somebody else who speaks.
LETTER = re.compile(r"\s*(?:dear|hi|hello|hey|thank you for)\b[^.!?\n]{0,40}[,.]", re.IGNORECASE)
SAYS = r"(?:said|says|thought|t(?:old|ells)|whispered|replied|cried|asked|answered|muttered|sighed|laughed|wept|wrote)"
SPEAKER = re.compile(rf"\b(?:he|she|they|we) (?:\w+ )?{SAYS}\b|\b{SAYS} (?:the |to |him|her|[A-Z])|, {SAYS}\b")
AI = r"(?:ai|artificial intelligence|language model|llm)"
DISCLAIMER = re.compile(
    rf"\b(?:as|being|i(?:'m| am)(?: just| only)?) an? (?:[\w-]+ ){{0,2}}?{AI}"
    r"(?=\s*[,.;:!]|\s*$| (?:language|model|assistant|system|so|and|but|i|with|that|without)\b)"
    r"|\bmy (?:knowledge|training) (?:cut-?off|data)\b"
    r"|\b(?:as of|since) my last (?:knowledge |training )?update\b"
    r"|\bals (?:ein )?(?:ki|künstliche intelligenz|(?:ki-)?sprachmodell|ki-\w+)\b"
    r"|\ben tant qu(?:e modèle de langage|'(?:ia|intelligence artificielle|assistant ia))\b"
    r"|\bcomo (?:un |una )?(?:modelo de (?:lenguaje|linguagem)|inteligencia artificial|ia)\b"
    r"|\bcome (?:modello linguistico|intelligenza artificiale|ia)\b"
    r"|作为(?:一个|一名)?(?:人工智能|ai|大?语言模型)|(?:ai|言語モデル)として"
    r"|как (?:языковая модель|ии|искусственный интеллект)\b",
    re.IGNORECASE,
)


# Every disclaimer has one of these words or characters.
DISCLAIMING = frozenset(
    words_of(
        """ai intelligence llm model cutoff cut training knowledge update ki intelligenz sprachmodell modèle ia modelo
        inteligencia modello intelligenza модель ии интеллект 能 语 語"""
    )
)


def is_refusal(sample: Sample) -> bool:
    """Whether a turn of the model opens with a refusal."""
    return any(map(_refuses, sample.model_turns))


def disclaimer(sample: Sample) -> str | None:
    """Report a phrase of assistants about themselves in the model's turns, whatever the maker."""
    if DISCLAIMING.isdisjoint(sample.model_vocabulary) and "ki-" not in sample.model.casefold():
        return None
    found = DISCLAIMER.search(sample.model.replace("’", "'"))
    return f"says '{found.group().lower()}'" if found else None


def _refuses(text: str) -> bool:
    opening = text[:OPENING].replace("’", "'")
    found = REFUSAL.search(opening) if SOMEBODY.search(opening) else None
    if found is None or quoted(opening, found.start()):
        return False
    return LETTER.match(opening) is None and SPEAKER.search(opening) is None
