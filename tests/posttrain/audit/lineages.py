"""A small lineage on the disk, and ways to damage it."""

from __future__ import annotations

import os
from pathlib import Path

from stages import Making, compiled, make, run, write_text_model

from gemma2.posttrain.pipelines.compile import Pipeline
from gemma2.posttrain.runs.run_directory import RunOptions

__all__ = ["DAMAGES", "base_model", "lineage", "made", "stages_of"]


def base_model(place: Path, text: str = "base") -> Path:
    """A model that no command made."""
    place.mkdir(parents=True)
    (place / "config.json").write_text('{"hidden": 4, "transformers_version": "5"}')
    (place / "chat_template.jinja").write_text("{{ messages }}")
    (place / "tokenizer.json").write_text("{}")
    write_text_model(place, text)
    return place


def stages_of(folder: Path) -> dict[str, object]:
    """raw model -> a -> b -> d, raw rows -> c -> d, e alone."""
    return {
        "a": {"command": "make", "options": {"model": str(folder / "raw"), "value": 1}},
        "b": {"command": "make", "options": {"model": "${a.out}", "value": 2}},
        "c": {"command": "make", "options": {"data": str(folder / "rows.jsonl"), "value": 3}},
        "d": {"command": "make", "options": {"models": ["${b.out}", "${c.out}"], "value": 4}},
        "e": {"command": "make", "options": {"value": 5}},
    }


def lineage(folder: Path) -> Pipeline:
    """The pipeline of `stages_of`, finished."""
    base_model(folder / "raw")
    (folder / "rows.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    pipeline = compiled(stages_of(folder), folder / "out")
    run(pipeline)
    return pipeline


def made(out: Path, **options: object) -> Path:
    """An output of `make` by itself."""
    make(Making.model_validate(options), RunOptions(out), None)
    return out


def _flipped(path: Path) -> None:
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 1
    path.write_bytes(text)


def _same_times(path: Path) -> None:
    status = path.stat()
    _flipped(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "flipped": _flipped,
    "same times": _same_times,
    "cut": _cut,
    "longer": _longer,
    "gone": Path.unlink,
    "a folder": _folder,
}
