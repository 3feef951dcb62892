"""Single flipped bits in the small files that decide what a model or a run is, and what each reader makes of them.

`FILES` has, for each file, the reader of the product that is called in this process and what its answer means. A flip
is refused (Gemma2Error, or a reader's own "not usable"), or accepted with the same meaning, or accepted with another:
then only in places that nothing on the disk could contradict, which are listed in `unverified` and counted by name.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from corpus import bounded

from gemma2.core.errors import Gemma2Error, InputError
from gemma2.core.outputs.manifest import STATE, read_manifest, require_complete
from gemma2.core.outputs.manifest import read_state as read_run
from gemma2.core.outputs.model_identity import INCIDENTAL_KEYS
from gemma2.core.outputs.promised import fault_of
from gemma2.core.outputs.safetensors_header import read_header
from gemma2.merging.inputs.adapter import open_adapter
from gemma2.merging.inputs.checkpoint import open_checkpoint
from gemma2.merging.inputs.compatibility import check_model
from gemma2.posttrain.checks.kinds import look_at
from gemma2.posttrain.generation.journal import Journal
from gemma2.posttrain.pipelines.state import folder_of, read_state, recorded_stages

SAME, REFUSED = "accepted, same meaning", "refused"
Meaning = dict[str, object]


class Unusable(Exception):
    """A reader's own word for a file that it does not use."""


@dataclass(frozen=True)
class Target:
    """A file of the world and its reader.

    read        what the product makes of it, as named values; raises Gemma2Error or Unusable if it refuses
    head        bytes from the beginning that are flipped; None: all
    unverified  names of values that may change unnoticed: nothing else on the disk says what they were
    lost_only   these may be lost, and are made again; they are never read as something else
    """

    file: str
    read: Callable[[Path], Meaning]
    head: Callable[[bytes], int] | None = None
    unverified: frozenset[str] = field(default_factory=frozenset)
    lost_only: bool = False


def _tensors(path: Path) -> Meaning:
    return {name: (t.dtype, t.shape, t.offset) for name, t in read_header(path).items()}


def _model(path: Path) -> Meaning:
    """A model by its index: every tensor, with the file that holds it."""
    model = open_checkpoint(path.parent, "model")
    places: Meaning = {name: (t.file.name, t.dtype, t.shape, t.offset) for name, t in model.tensors.items()}
    return places | {"a total_size, with a warning": model.doubts}


def _config(path: Path) -> Meaning:
    """A model by its configuration: what merges and the checks of every other command make of it."""
    look_at(path.parent)
    model = open_checkpoint(path.parent, "model")
    check_model(model)
    return dict(model.config)


def _adapter(path: Path) -> Meaning:
    adapter = open_adapter(path.parent, "adapter")
    updates: Meaning = {
        name: (update.a.name, update.b.name, update.transposed, update.rank) for name, update in adapter.updates.items()
    }
    scales = sorted({update.scale for update in adapter.updates.values()})
    return updates | {"replaced": sorted(adapter.replaced), "alpha": scales, "base": adapter.base_model_name}


def _manifest(path: Path) -> Meaning:
    require_complete(path.parent, "model")
    fault = fault_of(path.parent)
    if fault:
        raise InputError(fault)
    return dict(read_manifest(path.parent) or {})


def _run(path: Path) -> Meaning:
    return dict(read_run(path.parent))


def _pipeline(path: Path) -> Meaning:
    folder_of(path.parent)
    stages = recorded_stages(path.parent)
    found = read_state(path.parent)
    if found is None:
        raise Unusable
    return {**found, "stages": dict(stages)}


def _journal(path: Path) -> Meaning:
    """A copy is opened: a journal is cut behind its last whole record."""
    copy = path.with_name("copy.jsonl")
    shutil.copyfile(path, copy)
    with Journal(copy) as journal:
        return {f"record {number}": record for number, record in enumerate(journal.records())}


def _mark(path: Path) -> Meaning:
    from gemma2.posttrain.training.checkpoints import is_complete

    if not is_complete(path.parent):
        raise Unusable
    return {}


def _heldout(path: Path) -> Meaning:
    """The state of the held-out loss, as every file of a checkpoint, is protected by the mark."""
    return _mark(path)


def _header_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


CONFIG_VALUES = frozenset(
    {
        *("head_dim", "query_pre_attn_scalar"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "model_type", "tie_word_embeddings", "a new key"),
    }
)
RECORD_VALUES = frozenset(
    {
        *("schema_version", "gemma2", "command", "config", "parents", "data", "versions", "summary", "files", "code"),
        *("started", "ended", "status", "seed", "processes", "hardware", "a new key"),
    }
)
FILES = {
    "safetensors header": Target("rl-2/model.safetensors", _tensors, _header_length, frozenset({"a new key"})),
    "header of a shard": Target(
        "rl-1/model-00001-of-00002.safetensors",
        lambda path: _model(path),
        _header_length,
    ),
    "index": Target("rl-1/model.safetensors.index.json", _model, None, frozenset({"a total_size, with a warning"})),
    "config.json": Target("rl-2/config.json", _config, None, CONFIG_VALUES),
    "adapter_config.json": Target("lora/adapter_config.json", _adapter, None, frozenset({"alpha", "base"})),
    "gemma2.json": Target("rl-2/gemma2.json", _manifest, None, RECORD_VALUES),
    "run.json": Target(".out.partial/run.json", _run, None, RECORD_VALUES),
    "pipeline.json": Target(
        "run/pipeline.json",
        _pipeline,
        None,
        frozenset({"schema_version", "name", "status", "folder", "stages", "a new key"}),
    ),
    "journal": Target("journal/answers.jsonl", _journal, None, frozenset({"record 6", "record 7"}), lost_only=True),
    "mark of a checkpoint": Target("checkpoint-1/complete.json", _mark),
    "state of the trainer": Target("checkpoint-1/trainer_state.json", _heldout),
    "state of the held-out loss": Target("checkpoint-1/heldout.json", _heldout),
}


def write_others(root: Path) -> None:
    """The files that the world of the corpus lacks."""
    from gemma2.posttrain.training.checkpoints import mark_complete

    (root / ".out.partial").mkdir()
    shutil.copy(root / "rl-2/gemma2.json", root / ".out.partial" / STATE)
    (root / "run").mkdir()
    stage = {"command": "sft", "needs": [], "status": "complete", "started": "2026-11-29T10:00:00Z", "attempts": 1}
    stages = {"sft": stage, "merged": {**stage, "command": "merge linear", "needs": ["sft"], "status": "failed"}}
    document = {"schema_version": 2, "name": "run", "status": "failed", "folder": "..", "stages": stages}
    (root / "run/pipeline.json").write_text(json.dumps(document, indent=2))
    (root / "journal").mkdir()
    with Journal(root / "journal/answers.jsonl") as journal:
        for number in range(8):
            journal.append([{"key": f"{number}/0", "text": f"Answer {number}: é", "logprob": -0.5 * number}])
    (root / "checkpoint-1").mkdir()
    (root / "checkpoint-1/trainer_state.json").write_text(
        json.dumps({"global_step": 1, "log_history": [{"loss": 0.5}]})
    )
    (root / "checkpoint-1/heldout.json").write_text(json.dumps({"before": 1.0, "best": 0.5, "best_step": 1}))
    mark_complete(root / "checkpoint-1")


def flips(data: bytes, size: int, count: int, others: int, seed: int) -> Iterator[bytes]:
    """`count` copies of a file with one bit flipped in its first `size` bytes, all of them if there are fewer, and
    `others` copies with one byte replaced by any other."""
    dice = random.Random(seed)
    places = range(size * 8)
    chosen = places if count >= len(places) else sorted(dice.sample(places, count))
    for place in chosen:
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)
    for _ in range(others):
        changed = bytearray(data)
        changed[dice.randrange(size)] ^= dice.randrange(1, 256)
        yield bytes(changed)


def try_flips(root: Path, target: Target, count: int, others: int = 0, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Flip bits of one file; how often each outcome came, and the flips that broke the promise."""
    path = root / target.file
    data = path.read_bytes()
    size = len(data) if target.head is None else target.head(data)
    before, counts, broken = target.read(path), Counter[str](), []
    try:
        for flipped in flips(data, size, count, others, seed):
            path.write_bytes(flipped)
            outcome = _outcome(path, target, before)
            counts[outcome.partition(": ")[0]] += 1
            if outcome.startswith("broken"):
                at = next(i for i, (a, b) in enumerate(zip(data, flipped, strict=True)) if a != b)
                broken.append(f"{target.file}, byte {at} ({flipped[max(at - 20, 0) : at + 20]!r}): {outcome}")
    finally:
        path.write_bytes(data)
    return counts, broken


def _outcome(path: Path, target: Target, before: Meaning) -> str:
    try:
        with bounded(5):
            after = target.read(path)
    except (Gemma2Error, Unusable):
        return REFUSED
    except Exception as error:
        return f"broken: {type(error).__name__}: {error}"
    changed = {name for name in before | after if before.get(name, ...) != after.get(name, ...)} - INCIDENTAL_KEYS
    named = {name if name in before else "a new key" for name in changed}
    if not named:
        return SAME
    if "a new key" in named and target.unverified >= {"a new key"}:  # a key or a name that is spelt otherwise
        return "accepted, a name spelt otherwise"
    if target.lost_only and named <= target.unverified and not changed & after.keys():
        return "accepted without the end, which is made again"
    if not target.lost_only and named <= target.unverified:
        return "accepted, another value that nothing contradicts"
    return f"broken: accepted, changed: {sorted(named)}"
