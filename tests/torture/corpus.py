"""The corpus of malformed inputs: a small world of valid files, the ways to damage one of them, and the one judge.

A case is one change to the world and a command line. The real command line runs in this process (`run`), and `judge`
says what is wrong with how it ended: an exit code other than 1 or 2, more or less than one error line, a line that
does not name the file or the cause, a traceback, a file left behind, an input changed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from light_model import write_tokenizer
from model_files import added, entries, from_bytes, random_arrays, safetensors_bytes, write_model

from gemma2.cli.main import run as run_command
from gemma2.core.outputs.manifest import write_manifest
from gemma2.core.outputs.model_identity import identity_of, parent_record
from gemma2.posttrain.checks.tokenizers import chat_of

SECONDS = 10  # a bound on a hang, not on a duration
MOST_BYTES = 1 << 30  # of memory, where a case runs in a process that it has for itself
HIDDEN, WIDE, HEADS, HEAD, VOCABULARY = 8, 12, 2, 4, 128
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "query_pre_attn_scalar": HEAD,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
Q, PEFT = "model.layers.0.self_attn.q_proj", "base_model.model."
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "rl-2"}
Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One malformed input: what is done to the world, the command line, and what its error line must say.

    reports  the command exists to find such faults, and shows them on stdout
    """

    damage: Damage
    words: str
    says: tuple[str, ...]
    code: int | None = None  # None: 1 or 2
    reports: bool = False


# --- the world --------------------------------------------------------------------------------------------------------


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of a Gemma 2 of two layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            found[f"{at}{name}_layernorm.weight"] = (HIDDEN,)
        found |= {f"{at}self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN)}
        found |= {f"{at}self_attn.{name}_proj.weight": (HEAD, HIDDEN) for name in "kv"}
        found |= {f"{at}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD)}
        found |= {f"{at}mlp.{name}_proj.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        found |= {f"{at}mlp.down_proj.weight": (HIDDEN, WIDE)}
    return found | {"model.norm.weight": (HIDDEN,)}


CHATS = [
    {"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."}
    for a, b in ((1, 2), (3, 4), (5, 6), (7, 8), (2, 9), (4, 4))
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "I will not say."} for row in CHATS]
RECIPE = "# gemma2 sft: a recipe\nmodel: base\ndata: chats.jsonl\nepochs: 1\n"
MERGE_FILE = "method: linear\nmodels: [rl-1, rl-2]\n"
PIPELINE = """\
stages:
  sft:
    command: sft
    options: {model: base, data: [chats.jsonl]}
  merged:
    command: merge linear
    options: {models: ["${sft.out}", base]}
"""


def write_world(root: Path) -> Path:
    """Models (fp32, bf16 in two shards, fp16 with a manifest), an adapter, a reward model, data, YAML; all small."""
    root.mkdir(parents=True, exist_ok=True)
    base = random_arrays(0, 0.3, shapes())
    write_model(root / "base", base, "F32", config=CONFIG)
    write_model(root / "rl-1", added(base, random_arrays(1, 0.1, shapes())), "BF16", config=CONFIG, shards=2)
    write_model(root / "rl-2", added(base, random_arrays(2, 0.1, shapes())), "F16", config=CONFIG)
    head = {"score.weight": np.ones((1, HIDDEN)) * [0.1 * i for i in range(HIDDEN)]}
    kind = {"architectures": ["Gemma2ForSequenceClassification"], "num_labels": 1}
    write_model(root / "rm", base | head, "F32", config=CONFIG | kind)
    for name in ("base", "rl-1", "rl-2", "rm"):
        write_tokenizer(root / name)
    pair = random_arrays(3, 1.0, {f"{PEFT}{Q}.lora_A.weight": (2, HIDDEN), f"{PEFT}{Q}.lora_B.weight": (8, 2)})
    (root / "lora").mkdir()
    (root / "lora/adapter_model.safetensors").write_bytes(safetensors_bytes(entries(pair, "F32")))
    (root / "lora/adapter_config.json").write_text(json.dumps(LORA))
    parent = parent_record("policy", root / "base", identity_of(root / "base"), root / "rl-2")
    write_manifest(
        root / "rl-2",
        {"status": "complete", "command": "sft", "config": {}, "parents": [parent], "data": [], "versions": {}},
    )
    for name, rows in (("chats", CHATS), ("pairs", PAIRS), ("prompts", [{"prompt": row["prompt"]} for row in CHATS])):
        write_rows(root / f"{name}.jsonl", rows)
    (root / "table.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in CHATS)
    )
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "merge.yaml").write_text(MERGE_FILE)
    (root / "pipeline.yaml").write_text(PIPELINE)
    return root


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- damage: one change each ------------------------------------------------------------------------------------------


def nothing(root: Path) -> None:
    """The command line alone is at fault."""


def both(*changes: Damage) -> Damage:
    """One change that needs several steps."""

    def do(root: Path) -> None:
        for change in changes:
            change(root)

    return do


def removed(name: str) -> Damage:
    def do(root: Path) -> None:
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return do


def text(name: str, content: str | bytes) -> Damage:
    def do(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return do


def edited(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def do(root: Path) -> None:
        (root / name).write_bytes(change((root / name).read_bytes()))

    return do


def swapped(name: str, old: str, new: str) -> Damage:
    """A text in a file exchanged for another, once."""

    def change(data: bytes) -> bytes:
        assert old.encode() in data, f"{name} does not hold {old}"
        return data.replace(old.encode(), new.encode(), 1)

    return edited(name, change)


def keyed(name: str, **keys: object) -> Damage:
    """Keys of a JSON object set; `...` removes one."""

    def do(root: Path) -> None:
        found = json.loads((root / name).read_text()) | keys
        (root / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return do


def header(name: str, change: Callable[[dict[str, object]], object]) -> Damage:
    """The header of a safetensors file changed as a dictionary; its length follows."""

    def of_text(data: bytes) -> bytes:
        found = json.loads(data)
        result = change(found)
        return json.dumps(found if result is None else result).encode()

    return header_text(name, of_text)


def header_text(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def of_file(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        new = change(data[8 : 8 + length])
        return len(new).to_bytes(8, "little") + new + data[8 + length :]

    return edited(name, of_file)


def entry(name: str, tensor: str, **keys: object) -> Damage:
    """Keys of one tensor's entry set; `...` removes one."""

    def change(found: dict[str, object]) -> None:
        merged = found[tensor] | keys
        found[tensor] = {key: value for key, value in merged.items() if value is not ...}

    return header(name, change)


def tensors(directory: str, change: Callable[[dict[str, np.ndarray]], object], dtype: str | None = None) -> Damage:
    """The tensors of a model of one file changed as arrays, and written again."""

    def do(root: Path) -> None:
        path = root / directory / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries_ = json.loads(data[8 : 8 + length])
        arrays = {}
        for tensor, one in entries_.items():
            first, last = (8 + length + offset for offset in one["data_offsets"])
            arrays[tensor] = from_bytes(data[first:last], one["dtype"], one["shape"])
        change(arrays)
        kind = dtype or next(iter(entries_.values()))["dtype"]
        path.write_bytes(safetensors_bytes(entries(arrays, kind)))

    return do


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """A file exchanged for something else at its place: a folder, a pipe, a link."""

    def do(root: Path) -> None:
        if os.path.lexists(root / name):
            removed(name)(root)
        make(root / name)

    return do


def linked(name: str, target: str) -> Damage:
    return replaced(name, lambda path: path.symlink_to(target))


# --- running and judging ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a command line ended. trace: of what escaped it, empty if nothing did."""

    code: int
    out: str
    err: str
    trace: str = ""


class _Stream(io.TextIOWrapper):
    """stdout or stderr of a command in this process: a real stream with a buffer."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TimeoutError in a block that hangs."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"hangs: more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(root: Path, words: list[str], seconds: float = SECONDS) -> Ended:
    """Run one command line in this process, from the folder of the world."""
    out, err, trace, code = _Stream(), _Stream(), "", -1
    here, path = Path.cwd(), sys.path[:]
    chat_of.cache_clear()  # it remembers by path, and the worlds have the same paths
    os.chdir(root)
    try:
        with redirect_stdout(out), redirect_stderr(err), bounded(seconds):
            code = run_command(words)
    except BaseException:
        trace = traceback.format_exc()
    finally:
        os.chdir(here)
        sys.path[:] = path
    return Ended(code, out.text(), err.text(), trace)


def snapshot(root: Path) -> dict[str, tuple[str, object]]:
    """Every entry below a folder, hidden ones too, by kind and content."""
    found: dict[str, tuple[str, object]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_file():
            try:
                found[name] = ("file", path.read_bytes())
            except PermissionError:
                found[name] = ("file", path.stat().st_size)
        else:
            found[name] = ("folder" if path.is_dir() else "other", path.stat().st_mode)
    return found


def difference(before: dict[str, tuple[str, object]], after: dict[str, tuple[str, object]]) -> list[str]:
    """What is in one snapshot and not in the other."""
    left = [f"left behind: {name}" for name in after if name not in before]
    gone = [f"removed: {name}" for name in before if name not in after]
    return left + gone + [f"changed: {name}" for name in before if name in after and before[name] != after[name]]


def judge(case: Case, ended: Ended, changes: list[str]) -> list[str]:
    """Everything that is wrong with the end of a malformed case; empty if it is as promised."""
    if ended.trace:
        return [f"escaped: {ended.trace.strip().splitlines()[-1]}\n{ended.trace}"]
    faults = list(changes)
    if ended.code not in ((1, 2) if case.code is None else (case.code,)):
        faults.append(f"exit code {ended.code}")
    if "Traceback" in ended.err:
        faults.append("a traceback")
    if case.reports:
        return faults + [f"{part!r} is missing in: {ended.out}" for part in case.says if part not in ended.out]
    lines = ended.err.rstrip("\n").split("\n")
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1 or lines[-1] != errors[0]:
        return [*faults, f"not one error line at the end of {ended.err!r}"]
    if not errors[0].isprintable() or len(errors[0]) > 1200:
        faults.append("the error line is not a readable line")
    return faults + [f"{part!r} is missing in: {errors[0]}" for part in case.says if part not in errors[0]]


def tried(case: Case, template: Path, place: Path) -> tuple[Ended, list[str]]:
    """Copy the world, damage the copy, run the case there, and judge it."""
    shutil.copytree(template, place, symlinks=True)
    try:
        case.damage(place)
        before = snapshot(place)
        ended = run(place, case.words.split())
        return ended, judge(case, ended, difference(before, snapshot(place)))
    finally:
        _writable(place)
        shutil.rmtree(place)


def _writable(place: Path) -> None:
    for folder, names, _ in os.walk(place):
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                os.chmod(os.path.join(folder, name), 0o755)
