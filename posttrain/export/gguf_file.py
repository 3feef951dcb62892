"""`--gguf`: one GGUF file, made by the converter of a llama.cpp that the user points at.

The converter takes the vocabulary of a Gemma 2 from `tokenizer.model` alone. It runs in the Python of llama.cpp's own
.venv where there is one, else in this one; nothing of it comes with this package.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.ancestry import ancestor_paths
from gemma2.core.outputs.hub import SNAPSHOT
from gemma2.core.outputs.manifest import now, write_manifest
from gemma2.core.outputs.safetensors_header import parameter_count, printable, weight_files
from gemma2.core.outputs.staging import check_output, staged_output
from gemma2.core.progress import Progress
from gemma2.merging import MergeRequest, merge
from gemma2.merging.inputs.weight_files import companions
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.delivery.export import ExportConfig

from .exported_model import SENTENCEPIECE, ExportedModel, sentencepiece_of
from .writing import manifest_of

__all__ = ["plan_gguf", "write_gguf"]

CONVERTER = "convert_hf_to_gguf.py"
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # of a number; q8_0: 32 numbers share a scale
MISSING = re.compile(r"No module named '([\w.]+)'")
LONGEST = 200  # characters of the converter's last line


def plan_gguf(config: ExportConfig, source: ExportedModel, out: Path, force: bool) -> JsonObject:
    """Return what `write_gguf` would write. Raises InputError without a converter or a vocabulary for it."""
    check_output(out, force, {"model": source.path})
    converter_of(config)
    vocabulary = vocabulary_of(source)
    count = parameter_count(source.parts[0])
    return {
        "file": file_name(source, config),
        "bytes": round(count * BYTES[config.gguf or "f16"]),
        "vocabulary": str(vocabulary),
        "notes": ["the adapter is merged into its base first"] if source.adapter else [],
    }


def write_gguf(config: ExportConfig, source: ExportedModel, options: RunOptions, progress: Progress) -> JsonObject:
    """Write `options.out`/NAME-TYPE.gguf with its manifest, and return the figures of it."""
    check_output(options.out, options.force, {"model": source.path})
    converter, vocabulary = converter_of(config), vocabulary_of(source)
    started = now()
    with staged_output(options.out, options.force) as partial:
        file = partial / file_name(source, config)
        with plain_model(source, vocabulary, partial.parent, progress) as model:
            progress.note(f"{converter}: {config.gguf}")
            convert(converter, model, file, config.gguf or "f16")
        summary: JsonObject = {"file": file.name, "bytes": file.stat().st_size, "type": config.gguf}
        write_manifest(partial, {**manifest_of(config, source, options.out, started, summary)})
    return summary


def file_name(source: ExportedModel, config: ExportConfig) -> str:
    """The name of the GGUF file."""
    found = SNAPSHOT.search(source.path.resolve().as_posix())
    name = found["name"] if found else source.path.resolve().name
    return f"{name}-{config.gguf}.gguf"


def converter_of(config: ExportConfig) -> Path:
    """The converter in --llama-cpp. Raises InputError."""
    found = (config.llama_cpp or Path()) / CONVERTER
    if not found.is_file():
        raise InputError(
            f"--llama-cpp {config.llama_cpp} holds no {CONVERTER}",
            "give the source directory of llama.cpp: git clone https://github.com/ggml-org/llama.cpp",
        )
    return found


def vocabulary_of(source: ExportedModel) -> Path:
    """The SentencePiece file of a model. Raises InputError that says where to take it from."""
    found = sentencepiece_of(source.parts[0]) or sentencepiece_of(source.path)
    if found is not None:
        return found
    names = (SNAPSHOT.search(place.as_posix()) for place in ancestor_paths(source.parts[0]))
    hub = next((f"{name['owner']}/{name['name']}" for name in names if name), "google/gemma-2-2b-it")
    raise InputError(
        f"{source.parts[0]} has no {SENTENCEPIECE}, from which alone llama.cpp takes the vocabulary of a Gemma 2",
        f"if its tokenizer is Gemma 2's: hf download {hub} {SENTENCEPIECE} --local-dir {source.parts[0]}",
    )


@contextmanager
def plain_model(source: ExportedModel, vocabulary: Path, room: Path, progress: Progress) -> Iterator[Path]:
    """A directory that holds the whole model and its vocabulary: links to its files, or the adapter merged."""
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=room) as folder:
        place = Path(folder) / source.path.resolve().name
        if source.adapter is not None:
            merge(MergeRequest(method="passthrough", models=(source.given,)), out=place, progress=progress)
        else:
            place.mkdir()
            for file in (*weight_files(source.path), *source.path.glob("*.index.json"), *companions(source.path)):
                (place / file.name).symlink_to(file.resolve())
        if not (place / SENTENCEPIECE).exists():
            (place / SENTENCEPIECE).symlink_to(vocabulary.resolve())
        yield place


def convert(converter: Path, model: Path, file: Path, kind: str) -> None:
    """Run the converter. Raises InputError with its last line."""
    own = converter.parent / ".venv" / "bin" / "python"
    python = own if own.is_file() else Path(sys.executable)
    words = [str(python), str(converter.resolve()), str(model), "--outfile", str(file), "--outtype", kind]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise InputError(f"{python} cannot be started ({error.strerror})", "make llama.cpp's .venv again") from error
    if done.returncode == 0 and file.is_file():
        return
    said = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    missing = MISSING.search(done.stderr)
    if missing:
        needs = converter.parent / "requirements" / "requirements-convert_hf_to_gguf.txt"
        raise InputError(
            f"{converter} needs the package {missing[1]}, which {python} lacks",
            f"python -m venv {converter.parent / '.venv'} && {own} -m pip install -r {needs}",
        )
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), said[-1] if said else "")
    raise InputError(
        f"{converter} failed (exit code {done.returncode}): {printable(last.strip(), LONGEST) or 'it wrote no file'}",
        "see that its llama.cpp knows Gemma 2, and that its requirements are installed",
    )
