"""Tokenizer and chat template: ids, `<bos>`, padding, and that every text comes out as Gemma 2 was trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import printable
from gemma2.posttrain.data.chat import GEMMA_TEMPLATE
from gemma2.posttrain.data.template_time import FAILURES, bounded_rendering
from gemma2.posttrain.data.tokenizer import Tokenizer

from .finding import Diagnosis, fine, problem, warning
from .subject import Subject, listed_ids

__all__ = ["bos", "ids", "loads", "max_length", "pad", "rows", "system", "template"]

RESTORE = "copy the tokenizer files of the model that this was made from"
PUT_RIGHT = "gemma2 doctor MODEL --fix DIR puts it right"
IDS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<start_of_turn>": 106, "<end_of_turn>": 107}  # of every Gemma 2
SYSTEM = "Diagnosis in one word."
Turns = Sequence[dict[str, str]]
# One, two and three turns, with blanks at the ends, which Gemma 2's template strips.
TURNS: tuple[Turns, ...] = (
    ({"role": "user", "content": "Is 2 + 2 = 4? "},),
    ({"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Hello there.  "}),
    (
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1\n\n"},
        {"role": "user", "content": "Two?\n"},
    ),
)


def loads(subject: Subject) -> Iterator[Diagnosis]:
    if not subject.has_tokenizer:
        yield problem("there are not any tokenizer files", RESTORE)
    elif subject.tokenizer_fault:
        yield problem(subject.tokenizer_fault, RESTORE)
    elif subject.tokenizer is None:
        yield warning(
            "there is not any tokenizer.json: the checks of the tokenizer were left out", "save a fast tokenizer"
        )
    else:
        yield fine(f"{len(subject.tokenizer):,} tokens")


def ids(subject: Subject) -> Iterator[Diagnosis]:
    """Ids of the special tokens: of Gemma 2's tokenizer, and the same in all files."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return
    found = False
    if subject.is_gemma2:
        known = tokenizer.get_vocab()
        wrong = [
            f"{token} is {known.get(token, 'absent')} instead of {i}"
            for token, i in IDS.items()
            if known.get(token) != i
        ]
        if wrong:
            found = True
            yield problem(f"ids that Gemma 2 was not trained with: {', '.join(wrong)}", RESTORE)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = getattr(tokenizer, key)
        for name in ("config.json", "generation_config.json"):
            stated = listed_ids(subject.json(name), key)
            if own is not None and stated and own not in stated:
                found = True
                yield problem(
                    f"{key} is {own} in the tokenizer, {stated[0]} in {name}", f"set {key} in {name} to {own}"
                )
    if not found:
        shown = ", ".join(f"{key} {getattr(tokenizer, key + '_token_id')}" for key in ("bos", "eos", "pad"))
        yield fine(shown)


def pad(subject: Subject) -> Iterator[Diagnosis]:
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return
    if tokenizer.pad_token_id is None:
        yield warning("the tokenizer has no token for padding", f"set pad_token; {PUT_RIGHT}")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield warning("padding is the end token: training would mask real ends", f"set pad_token; {PUT_RIGHT}")
    else:
        yield fine(f"{printable(str(tokenizer.pad_token))}, not the end token")


def rows(subject: Subject) -> Iterator[Diagnosis]:
    tokenizer, embedding = subject.tokenizer, subject.embedding
    if tokenizer is None or embedding is None:
        return
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= embedding.shape[0]:
        yield problem(
            f"token {largest} has no row in the embedding of {embedding.shape[0]} rows",
            "use the tokenizer that the weights were trained with",
        )
    else:
        yield fine(f"ids up to {largest}, {embedding.shape[0]} rows")


def bos(subject: Subject) -> Iterator[Diagnosis]:
    """One `<bos>` for a plain text, for a rendered chat, and for that rendering when it is tokenised."""
    tokenizer = subject.tokenizer
    if tokenizer is None or tokenizer.bos_token_id is None or not subject.is_gemma2:
        return
    token = tokenizer.bos_token_id
    count = tokenizer.encode("A plain text.").count(token)
    if count != 1:
        yield problem(
            f"a plain text gets {count} <bos>, Gemma 2 was trained with one: scores and losses are wrong",
            f"restore the post-processor of tokenizer.json; {PUT_RIGHT}",
        )
        return
    if tokenizer.chat_template:
        text = _rendered(tokenizer, TURNS[2])
        tokens = None if text is None else tokenizer.encode(text, add_special_tokens=False)
        if tokens is not None and tokens.count(token) != 1:
            fix = f"restore the chat template; {PUT_RIGHT}"
            yield problem(f"a rendered chat has {tokens.count(token)} <bos> instead of one", fix)
            return
    yield fine("one, for a text and for a chat")


def _rendered(tokenizer: Tokenizer, turns: Turns, prompt: bool = False) -> str | None:
    """The template's text, or None where it refuses the turns."""
    from jinja2.exceptions import TemplateError

    try:
        with bounded_rendering(tokenizer.chat_template):
            return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt))
    except (InputError, TemplateError, *FAILURES):
        return None


def _expected(turns: Turns, prompt: bool) -> str:
    """What Gemma 2 was trained on (report, Tables 4 and 5)."""
    role = {"assistant": "model"}
    text = "".join(
        f"<start_of_turn>{role.get(turn['role'], turn['role'])}\n{turn['content'].strip()}<end_of_turn>\n"
        for turn in turns
    )
    return f"<bos>{text}" + "<start_of_turn>model\n" * prompt


def template(subject: Subject) -> Iterator[Diagnosis]:
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return
    if not tokenizer.chat_template:
        yield fine("none: a pre-trained model; gemma2 trains it with Gemma's" if subject.is_gemma2 else "none")
        return
    if tokenizer.chat_template == GEMMA_TEMPLATE:
        yield fine("Gemma 2's")
        return
    if not subject.is_gemma2:
        ok = _rendered(tokenizer, TURNS[0], prompt=True) is not None
        yield fine("renders") if ok else problem("it does not render a user's turn", RESTORE)
        return
    for turns in TURNS:
        prompt = turns[-1]["role"] == "user"
        found, wanted = _rendered(tokenizer, turns, prompt), _expected(turns, prompt)
        if found is None:
            yield problem(f"it refuses {len(turns)} turns", f"restore the chat template; {PUT_RIGHT}")
            return
        if found != wanted:
            place = next(
                (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
            )
            here, there = (printable(ascii(text[max(place - 10, 0) : place + 20]), 60) for text in (found, wanted))
            yield problem(
                f"{len(turns)} turns come out as ..{here}.. where Gemma 2 was trained on ..{there}..",
                f"restore the chat template; {PUT_RIGHT}",
            )
            return
    yield fine("the same text as Gemma 2's, for 1, 2 and 3 turns")


def system(subject: Subject) -> Iterator[Diagnosis]:
    """A system text is folded in or refused, never dropped."""
    tokenizer = subject.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return
    text = _rendered(tokenizer, [{"role": "system", "content": SYSTEM}, *TURNS[0]], prompt=True)
    if text is None:
        yield fine("refused; gemma2 folds it into the first user turn")
    elif SYSTEM in text:
        yield fine("part of the text")
    else:
        yield problem("the template drops a system text without a word", f"restore the chat template; {PUT_RIGHT}")


def max_length(subject: Subject) -> Iterator[Diagnosis]:
    tokenizer, context = subject.tokenizer, subject.number("max_position_embeddings")
    if tokenizer is None or context is None:
        return
    if tokenizer.model_max_length < context:
        yield warning(
            f"model_max_length is {tokenizer.model_max_length}, the model's context {context}: texts would be cut",
            f"set model_max_length to {context}; {PUT_RIGHT}",
        )
    else:
        yield fine("not shorter than the context")
