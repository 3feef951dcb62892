"""Data sets of the hub, copied into the cache as parquet.

ORG/NAME[:CONFIG][@SPLIT]     split: train
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.home import cache_folder

from .folders import SUFFIXES, format_of

__all__ = ["from_hub", "is_hub_set"]

HUB_SET = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?", re.ASCII)


def is_hub_set(path: Path) -> bool:
    """Whether a path that is not here can be a hub data set: no data file's suffix, and no folder of that name here."""
    plausible = HUB_SET.fullmatch(str(path)) is not None and format_of(path) not in SUFFIXES
    return plausible and not Path(path.parts[0]).exists()


def from_hub(name: str) -> Path:
    """A hub data set as one parquet file in the cache; fetched at the first use.

    Its name holds the fingerprint of the content, so that a set that changed on the hub is another file.
    """
    import datasets

    found = HUB_SET.fullmatch(name)
    assert found is not None
    split = found["split"] or "train"
    try:
        loaded = datasets.load_dataset(found["name"], found["config"], split=split)
    except (OSError, ValueError) as error:  # not found, offline, no such config or split
        detail = " ".join(str(error).split())[:160]
        raise InputError(
            f"{name} is not a file here, and cannot be loaded from the hub ({detail})",
            "give a file, or check name, config and split; go online once if HF_HUB_OFFLINE is set",
        ) from error
    folder = cache_folder("data")
    folder.mkdir(parents=True, exist_ok=True)
    plain = re.sub(r"[^\w.-]+", "--", f"{found['name']}-{found['config'] or 'default'}-{split}")
    target = folder / f"{plain}-{loaded._fingerprint}.parquet"
    if not target.exists():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        loaded.to_parquet(str(aside))
        aside.replace(target)
    return target
