"""generation_config.json: what ends an answer."""

from __future__ import annotations

from collections.abc import Iterator

from .finding import Check, Depth, Diagnosis, fine, problem, warning
from .subject import POLICY, Subject, listed_ids

__all__ = ["CHECKS", "turn_ids"]

FILE = "generation_config.json"
FIX = "gemma2 doctor MODEL --fix DIR writes it"


def turn_ids(subject: Subject) -> dict[str, int]:
    """The ids of `<eos>` and `<end_of_turn>` by tokenizer.json, without loading it as a tokenizer."""
    added = subject.json("tokenizer.json").get("added_tokens")
    found = (
        {one.get("content"): one.get("id") for one in added if isinstance(one, dict)} if isinstance(added, list) else {}
    )
    return {name: i for name in ("<eos>", "<end_of_turn>") if isinstance(i := found.get(name), int)}


def _is_tuned(subject: Subject) -> bool:
    """Whether the model answers in turns: it comes with a chat template."""
    inside = subject.json("tokenizer_config.json").get("chat_template")
    return bool(inside) or (subject.path / "chat_template.jinja").is_file()


def _stops(subject: Subject) -> Iterator[Diagnosis]:
    if fault := subject.fault(FILE):
        yield problem(fault, FIX)
        return
    if not (subject.path / FILE).is_file():
        yield warning(f"there is not any {FILE}: other tools guess where an answer ends", FIX)
        return
    settings = subject.json(FILE)
    stops, rows = listed_ids(settings, "eos_token_id"), subject.number("vocab_size")
    outside = [i for i in stops if rows is not None and not 0 <= i < rows]
    lacking = [
        f"{token} ({i})"
        for token, i in turn_ids(subject).items()
        if i not in stops and (token == "<eos>" or _is_tuned(subject))
    ]
    if outside:
        yield problem(f"stop id {outside[0]} is outside the vocabulary of {rows}", FIX)
    elif subject.is_gemma2 and lacking:
        yield problem(f"{' and '.join(lacking)} does not end an answer: every answer runs to the limit", FIX)
    elif not stops:
        yield warning("no stop id", FIX)
    elif "max_length" in settings:
        yield warning(f"max_length {settings['max_length']} cuts prompt and answer together", f"remove it; {FIX}")
    else:
        yield fine(f"ids {', '.join(map(str, stops))}")


CHECKS = (
    Check("stops", "<eos> and <end_of_turn> end an answer; no max_length", Depth.QUICK, frozenset({POLICY}), _stops),
)
