"""A task for real weights whose reward is a rule that everybody can check: one short sentence with two given words.

    python bench/tasks.py --out runs/real-warp        words.jsonl, words-held.jsonl

`sentence` is the share of the two words that an answer has (0, 0.5 or 1), and 0 for an answer that is cut, has fewer
than SHORTEST or more than LONGEST words, or repeats ECHO words of the prompt in a row. Without the last two rules RL
finds "A kite and a mountain." and echoes of the prompt within 16 steps. Held-out prompts have other words than training
prompts: what carries over is the way of answering.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["HELD_WORDS", "TRAIN_WORDS", "keywords", "sentence", "write_prompts"]

TRAINED = """
apple anchor basket bell blanket boat bottle bridge broom bucket button camel candle carpet castle chair cherry clock
cloud coin desk dog dragon drum eagle engine feather fence fiddle flag forest fox garden glove goat guitar hammer
harbor hat horse island jacket kettle king ladder lamp lemon lion market mirror monkey needle ocean oven paper pencil
piano pillow pocket queen rabbit river robot rope sailor shoe snow soup spoon teacher
"""  # 70 words
HELD_OUT = """
airport baker ball barn bear bicycle bird book bread brush cake canal cat coat cow doctor door farmer fish flute frog
hill honey kite knife lake letter moon mountain mouse museum orange painter pear pond road rose sheep ship singer star
stone sun table tiger tower train tree village window
"""  # 50 others
TRAIN_WORDS, HELD_WORDS = TRAINED.split(), HELD_OUT.split()
WORDINGS = (
    "Write one short sentence with the words {} and {}.",
    "Make a short sentence that uses both {} and {}.",
    "Use the words {} and {} in one short sentence.",
    "Give me one brief sentence that contains {} and {}.",
)
SHORTEST, LONGEST = 6, 16  # words of an answer
ECHO = 4  # words in a row


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def keywords(
    completions: Sequence[str], words: Sequence[Sequence[str]], truncated: Sequence[bool], **columns: object
) -> list[float]:
    """Share of the given words in each answer, their plurals too; 0 if it is cut or longer than LONGEST words."""
    return [
        0.0 if cut or len(_words(text)) > LONGEST else _share(text, wanted)
        for text, wanted, cut in zip(completions, words, truncated, strict=True)
    ]


def sentence(
    prompts: Sequence[Sequence[dict[str, str]]],
    completions: Sequence[str],
    words: Sequence[Sequence[str]],
    truncated: Sequence[bool],
    **columns: object,
) -> list[float]:
    """`keywords`, and 0 for an answer under SHORTEST words or one that repeats ECHO words of its prompt in a row."""
    shares = keywords(completions, words, truncated)
    return [
        0.0 if len(_words(text)) < SHORTEST or _echoes(text, prompt[-1]["content"]) else share
        for text, prompt, share in zip(completions, prompts, shares, strict=True)
    ]


def _share(text: str, wanted: Sequence[str]) -> float:
    found = set(_words(text))
    return sum(word in found or f"{word}s" in found for word in wanted) / len(wanted)


def _echoes(text: str, prompt: str) -> bool:
    own, given = _words(text), _words(prompt)
    runs = {tuple(given[i : i + ECHO]) for i in range(len(given) - ECHO + 1)}
    return any(tuple(own[i : i + ECHO]) in runs for i in range(len(own) - ECHO + 1))


def rows_of(vocabulary: Sequence[str], count: int, seed: int) -> list[dict[str, object]]:
    """Prompts with distinct pairs of words, in both orders and all wordings."""
    generator = random.Random(seed)
    pairs = list(itertools.combinations(vocabulary, 2))
    generator.shuffle(pairs)
    rows: list[dict[str, object]] = []
    for pair in pairs[:count]:
        chosen = list(pair)
        generator.shuffle(chosen)
        rows.append({"prompt": generator.choice(WORDINGS).format(*chosen), "words": chosen})
    return rows


def write_prompts(directory: Path, train: int, held: int) -> None:
    """Write both files: `words` of a row goes to the reward function as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, vocabulary, count, seed in (("words", TRAIN_WORDS, train, 0), ("words-held", HELD_WORDS, held, 1)):
        lines = [json.dumps(row) + "\n" for row in rows_of(vocabulary, count, seed)]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/real-warp"))
    options = parser.parse_args()
    write_prompts(options.out, 800, 500)
