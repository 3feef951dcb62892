"""The tasks of the suite: facts in `evaluation/tasks/*.yaml`, under lm-eval's names where it has them. Torch-free.

A prompt is description + shots + question, each shot "text answer" followed by an empty line; the scored continuation
is " " + choice. In a chat the continuation has no blank in front: it begins the model's turn.

    acc       the choice with the highest log-likelihood is the right one
    acc_norm  the same for log-likelihood / characters of the choice

Sources: the data sets' papers (in the YAML files), prompts and metrics of lm-eval 0.4.13's tasks (mmlu 1.0 of each
subject, arc_challenge 1.0, gsm8k 3.0, winogrande 1.0, hellaswag 1.0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field

from gemma2.core.yaml_files import read_documents
from gemma2.posttrain.schemas.config import Config, validated

__all__ = ["SUITES", "TASKS", "Doc", "Extraction", "SuiteTask", "load_task", "tasks_of"]

FOLDER = Path(__file__).parent.parent / "tasks"
SUITES = {"gemma2": ("mmlu", "arc_challenge", "gsm8k", "winogrande", "hellaswag")}
TASKS = SUITES["gemma2"]
Doc = Mapping[str, object]


class Extraction(Config):
    """Which match of a pattern in an answer is compared."""

    pattern: str
    which: Literal["first", "last"]


class SuiteTask(Config):
    """One task, as its YAML file states it."""

    task: str
    title: str
    dataset_path: str
    columns: dict[str, str | int]
    group: str | None = None  # column whose values are evaluated one by one, each with its examples
    num_fewshot: int
    fewshot_splits: tuple[str, ...]
    test_splits: tuple[str, ...]
    spare_shot: bool = False  # one example more is drawn, and the last one left out
    sampler: Literal["default", "first_n"] = "default"
    output_type: Literal["multiple_choice", "generate_until"] = "multiple_choice"
    description: str = ""
    doc_to_text: str
    doc_to_choice: str | tuple[str, ...] = "{{choice}}"
    doc_to_target: str = ""
    choice_in_text: bool = False
    until: tuple[str, ...] = ()
    filters: dict[str, Extraction] = Field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    metrics: tuple[str, ...]

    @property
    def generates(self) -> bool:
        """Whether the model writes an answer; else choices are scored."""
        return self.output_type == "generate_until"

    @property
    def metric(self) -> str:
        """The metric that Gemma 2's report is compared with."""
        return self.metrics[0]

    def group_of(self, doc: Doc) -> str:
        """The value of the group's column; empty for a task without groups."""
        return str(doc[self.group]) if self.group else ""

    def describe(self, doc: Doc) -> str:
        """The text in front of the examples."""
        return _rendered(self.description, doc)

    def text(self, doc: Doc, choice: int | None = None) -> str:
        """The question; where the choice is a part of it, with that choice."""
        if not self.choice_in_text:
            return _rendered(self.doc_to_text, doc)
        return _rendered(self.doc_to_text, {**doc, "choice": _choices(doc)[_index(doc) if choice is None else choice]})

    def choices(self, doc: Doc) -> list[str]:
        """The texts whose lengths and log-likelihoods are compared."""
        if isinstance(self.doc_to_choice, tuple):
            return list(self.doc_to_choice)
        if self.choice_in_text:
            return [self.text(doc, number) for number in range(len(_choices(doc)))]
        return [_rendered(self.doc_to_choice, {**doc, "choice": choice}) for choice in _choices(doc)]

    def answer(self, doc: Doc) -> str:
        """The text of the right answer, as an example shows it."""
        return _rendered(self.doc_to_target, doc) if self.doc_to_target else self.choices(doc)[_index(doc)]

    def target(self, doc: Doc) -> int | str:
        """The index of the right choice, or the answer with its calculation."""
        return self.answer(doc) if self.generates else _index(doc)


def _choices(doc: Doc) -> Sequence[str]:
    found = doc["choices"]
    assert isinstance(found, list)
    return found


def _index(doc: Doc) -> int:
    found = doc["answer"]
    assert isinstance(found, int)
    return found


def _plain(text: str) -> str:
    """A text of HellaSwag without WikiHow's marks, as its task cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@lru_cache(maxsize=64)
def _template(text: str) -> Template:
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["plain"] = _plain
    return environment.from_string(text)


def _rendered(template: str, doc: Doc) -> str:
    return _template(template).render(doc)


@lru_cache(maxsize=16)
def load_task(name: str) -> SuiteTask:
    """The task of that name."""
    return validated(SuiteTask, read_documents(FOLDER / f"{name}.yaml")[0])


def tasks_of(suite: str, names: Iterable[str]) -> list[SuiteTask]:
    """The tasks of a suite, in its order; `names` chooses some."""
    wanted = set(names)
    return [load_task(name) for name in SUITES[suite] if not wanted or name in wanted]
