"""The suite's data sets from the hub, by the ids of lm-eval's tasks, through `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping

from .data_rows import DataRow, arc_row, gsm8k_row, hellaswag_row, mmlu_row, winogrande_row

__all__ = ["HUB_SETS", "hub_rows"]


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
