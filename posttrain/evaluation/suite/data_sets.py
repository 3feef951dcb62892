"""The suite's data sets: their columns as rows of our files, their sizes, their ids on the hub, reading from there.

    mmlu           id, split (dev, test), subject, question, choices, answer
    arc_challenge  id, split (train, validation, test), question, choices, answer
    hellaswag      id, split (train, validation), context, choices, answer
    winogrande     id, split (train, validation), sentence (with one _), choices (for the _), answer
    gsm8k          id, split (train, test), question, answer (the solution, which ends in `#### NUMBER`)

`answer` of a multiple choice is the index of the right one in `choices`. HellaSwag's context is "ACTIVITY: A B", its
second part capitalised, as lm-eval joins them; the marks of WikiHow stay in, the task takes them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject

__all__ = [
    "COUNTS",
    "HUB_SETS",
    "SPLITS",
    "TASKS",
    "DataRow",
    "arc_row",
    "gsm8k_row",
    "hellaswag_row",
    "hub_rows",
    "mmlu_row",
    "winogrande_row",
]

TASKS = ("mmlu", "arc_challenge", "gsm8k", "winogrande", "hellaswag")
DataRow = JsonObject

# Rows of every split in the published data sets.
COUNTS: Mapping[tuple[str, str], int] = {
    ("mmlu", "dev"): 285,
    ("mmlu", "test"): 14042,
    ("arc_challenge", "train"): 1119,
    ("arc_challenge", "validation"): 299,
    ("arc_challenge", "test"): 1172,
    ("gsm8k", "train"): 7473,
    ("gsm8k", "test"): 1319,
    ("winogrande", "train"): 40398,
    ("winogrande", "validation"): 1267,
    ("hellaswag", "train"): 39905,
    ("hellaswag", "validation"): 10042,
}


@dataclass(frozen=True)
class Splits:
    """The splits of a task: `asked` holds the questions, `shown` the few-shot examples."""

    asked: str
    shown: str


SPLITS = {
    "mmlu": Splits("test", "dev"),
    "arc_challenge": Splits("test", "train"),
    "gsm8k": Splits("test", "train"),
    "winogrande": Splits("validation", "train"),
    "hellaswag": Splits("validation", "train"),
}


def mmlu_row(row: JsonMapping, split: str, number: int) -> DataRow:
    """From `cais/mmlu` and `hails/mmlu_no_train`; `number` counts within the subject."""
    subject = str(row["subject"])
    return {
        "id": f"{subject}/{split}/{number}",
        "split": split,
        "subject": subject,
        "question": row["question"],
        "choices": list(row["choices"]),
        "answer": int(row["answer"]),
    }


def arc_row(row: JsonMapping, split: str, number: int) -> DataRow:
    """From `allenai/ai2_arc`; the labels are A, B, ... or 1, 2, ..."""
    choices = row["choices"]
    return {
        "id": f"{split}/{number}/{row['id']}",
        "split": split,
        "question": row["question"],
        "choices": list(choices["text"]),
        "answer": list(choices["label"]).index(row["answerKey"]),
    }


def hellaswag_row(row: JsonMapping, split: str, number: int) -> DataRow:
    """From `Rowan/hellaswag`."""
    return {
        "id": f"{split}/{number}",
        "split": split,
        "context": f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}",
        "choices": list(row["endings"]),
        "answer": int(row["label"]),
    }


def winogrande_row(row: JsonMapping, split: str, number: int) -> DataRow:
    """From `allenai/winogrande`, configuration winogrande_xl."""
    return {
        "id": f"{split}/{number}",
        "split": split,
        "sentence": row["sentence"],
        "choices": [row["option1"], row["option2"]],
        "answer": int(row["answer"]) - 1,
    }


def gsm8k_row(row: JsonMapping, split: str, number: int) -> DataRow:
    """From `openai/gsm8k`, configuration main."""
    return {"id": f"{split}/{number}", "split": split, "question": row["question"], "answer": row["answer"]}


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, its configuration, its splits, and what makes one of our rows of its rows."""

    name: str
    config: str | None
    splits: tuple[str, ...]
    row: Callable[[JsonMapping, str, int], DataRow]


HUB_SETS = {
    "mmlu": HubSet("cais/mmlu", "all", ("dev", "test"), mmlu_row),
    "arc_challenge": HubSet("allenai/ai2_arc", "ARC-Challenge", ("train", "validation", "test"), arc_row),
    "gsm8k": HubSet("openai/gsm8k", "main", ("train", "test"), gsm8k_row),
    "winogrande": HubSet("allenai/winogrande", "winogrande_xl", ("train", "validation"), winogrande_row),
    "hellaswag": HubSet("Rowan/hellaswag", None, ("train", "validation"), hellaswag_row),
}


def hub_rows(task: str) -> Iterator[DataRow]:
    """The rows of a task, split by split. Raises InputError for a hub that cannot be reached."""
    import datasets

    source = HUB_SETS[task]
    for split in source.splits:
        try:
            loaded = datasets.load_dataset(source.name, source.config, split=split)
        except (OSError, ValueError) as error:  # offline, not found, no such configuration
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{source.name} cannot be read from the hub: {first}",
                "without a hub: gemma2 eval data --from package --out DIR",
            ) from error
        seen: dict[str, int] = {}
        for row in loaded:
            subject = str(row.get("subject", ""))  # MMLU counts its rows within the subject
            yield source.row(row, split, seen.get(subject, 0))
            seen[subject] = seen.get(subject, 0) + 1
