"""Of generated rows with random shapes, columns, keys, nulls and roles, nothing is dropped in silence."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from row_reading import plain_reading

from gemma2.posttrain.data.reading import SKIPPED

ROWS = 500
COLUMNS = ["id", "source", "tools", "images", "system", "score", "meta", "category", "prompt_id", "finish_note"]
KEYS = ["name", "tool_calls", "reasoning_content", "id", "weight", "cut"]
ROLES = ["user", "assistant", "system", "human", "gpt", "model", "developer", "tool", "robot"]


class Maker:
    """Makes rows whose every value is a word that occurs once."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.count = 0

    def word(self) -> str:
        self.count += 1
        return f"word{self.count:05d}"

    def value(self) -> object:
        forms = [
            self.word,
            lambda: None,
            lambda: "",
            lambda: [],
            lambda: {"inside": self.word()},
            lambda: [self.word()],
        ]
        return self.draw.choice(forms)()

    def message(self, role: str, names: tuple[str, str]) -> dict[str, object]:
        if self.draw.random() < 0.05:
            role = self.draw.choice(ROLES)
        text: object = self.word()
        if self.draw.random() < 0.1:
            text = [{"type": "text", "text": self.word()}, {"type": "text", "text": text}]
        made = {names[0]: role, names[1]: None if self.draw.random() < 0.03 else text}
        for key in KEYS:
            if self.draw.random() < 0.05:
                made[key] = self.draw.choice([0, 1, None]) if key == "weight" else self.value()
        return made

    def turns(self, names: tuple[str, str]) -> list[dict[str, object]]:
        roles = ["user", "assistant"] * self.draw.randint(1, 3)
        return [self.message(role, names) for role in roles]

    def row(self) -> dict[str, object]:
        made = self.draw.choice(
            [
                lambda: {"messages": self.turns(("role", "content"))},
                lambda: {"conversations": self.turns(("from", "value"))},
                lambda: {"prompt": self.word(), "completion": self.word()},
                lambda: {"instruction": self.word(), "input": self.value(), "output": self.word()},
                lambda: {"question": self.word(), "answer": self.value()},
                lambda: {"text": f"Human: {self.word()}\n\nAssistant: {self.word()}"},
            ]
        )()
        for column in COLUMNS:
            if self.draw.random() < 0.15:
                made[column] = self.value()
        return made


def words(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from words(inner)
    elif isinstance(value, str):
        yield from (word for word in value.split() if word.startswith("word"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ignored", [(), ("name", "id", "cut")])
def test_every_word_of_a_file_is_learned_or_its_row_refused_or_its_column_named(tmp_path, interrupting, seed, ignored):
    maker = Maker(seed)
    rows = [maker.row() for _ in range(ROWS)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading, progress = plain_reading(on_bad_row="skip", ignore_keys=ignored), interrupting()
    read = {row.where: row for row in reading.conversations(path)}
    counts = reading.report(progress, tmp_path)
    skipped = [json.loads(line) for line in (tmp_path / SKIPPED).read_text().splitlines()]

    refused = {word for row in skipped for word in words(row)}
    learned = {word for row in read.values() for message in row.messages for word in words(message["content"])}
    named: Counter[str] = Counter()
    silent = []
    for number, row in enumerate(rows, start=1):
        kept = read.get(f"{path}:{number}")
        for column, value in row.items():
            lost = [word for word in words(value) if word not in refused and word not in learned]
            if lost and kept is not None and column in kept.extra:
                named[column] += 1
            elif column in ("messages", "conversations"):
                silent += [word for word in lost if word not in ignored_words(value, ignored)]
            else:
                silent += lost
    assert silent == []
    assert len(read) + len(skipped) == ROWS and counts["skipped_rows"] == len(skipped)
    assert counts["unread_columns"] == dict(named)
    assert min(len(read), len(skipped)) > ROWS / 10  # both sides are tried


def ignored_words(messages: object, ignored: tuple[str, ...]) -> set[str]:
    """What stands under the keys that the caller has told to leave out."""
    assert isinstance(messages, list)
    return {word for message in messages for key in ignored for word in words(message.get(key))}
