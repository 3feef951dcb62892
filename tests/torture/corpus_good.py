"""Good inputs that look unusual: each must be accepted. A control that fails shows that a refusal goes too far."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus import Damage, both, edited, header, header_text, keyed, nothing, tensors, text
from corpus_data import parquet
from corpus_models import EMBED, INDEX, RL2

MERGE = "merge linear rl-1 rl-2 --out out"
DRY = "sft --model base --data {} --out out --dry-run"


@dataclass(frozen=True)
class Good:
    """A change that leaves the input good, the command line, and what it says on stderr or stdout, if anything."""

    change: Damage
    words: str
    says: tuple[str, ...] = ()


def moved(old: str, new: str) -> Damage:
    def do(root: Path) -> None:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)

    return do


def in_hub_cache(root: Path) -> None:
    """rl-2 as the hub's cache keeps it: a snapshot of links to blobs."""
    blobs, snapshot = root / "models--a--b/blobs", root / "models--a--b/snapshots/0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((root / "rl-2").iterdir())):
        if path.name != "gemma2.json":
            shutil.copy(path, blobs / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")


def packed(pack: Callable[[bytes], bytes], name: str) -> Damage:
    return lambda root: (root / name).write_bytes(pack((root / "chats.jsonl").read_bytes()))


def metadata(**keys: object) -> Damage:
    def do(root: Path) -> None:
        found = json.loads((root / INDEX).read_text())
        (root / INDEX).write_text(json.dumps(found | {"metadata": keys}))

    return do


def with_empty(arrays: dict[str, np.ndarray]) -> None:
    arrays["model.layers.0.rotary.inv_freq"] = np.ones(())
    arrays["model.layers.0.empty"] = np.ones((0, 8))


GOOD = {
    "plain": Good(nothing, "merge linear base --out out"),
    "two shards with one file, bf16 with fp16": Good(nothing, MERGE),
    "with a base": Good(nothing, "merge slerp rl-1 rl-2 --base base --out out"),
    "an adapter and its model": Good(nothing, "merge linear lora --out out"),
    "MODEL+ADAPTER": Good(nothing, "merge linear rl-2+lora --out out"),
    "reward models": Good(nothing, "merge linear rm rm --out out"),
    "blanks behind the header": Good(header_text(RL2, lambda data: data + b" " * 100), MERGE),
    "blanks inside the header": Good(
        header_text(RL2, lambda data: json.dumps(json.loads(data), indent=3).encode()), MERGE
    ),
    "an empty __metadata__": Good(header(RL2, lambda h: {"__metadata__": {}} | h), MERGE),
    "texts as __metadata__": Good(header(RL2, lambda h: h | {"__metadata__": {"format": "pt", "é": "\n"}}), MERGE),
    "tensors in another order": Good(header(RL2, lambda h: dict(reversed(h.items()))), MERGE),
    "a scalar and an empty tensor": Good(
        both(tensors("rl-2", with_empty), tensors("base", with_empty)), "merge linear rl-2 base --out out"
    ),
    "a stored copy of the tied embedding": Good(
        tensors("rl-2", lambda a: a.update({"lm_head.weight": a[EMBED]})), MERGE, ("lm_head.weight",)
    ),
    "a wrong total_size": Good(
        metadata(total_size=5), MERGE, ("warning: rl-1/model.safetensors.index.json", "total_size of 5")
    ),
    "a total_size that is a text, shown": Good(metadata(total_size="many"), "inspect rl-1", ("total_size of many",)),
    "an index without metadata": Good(keyed(INDEX, metadata=...), MERGE),
    "zeros alone": Good(
        tensors("rl-2", lambda a: a.update({k: v * 0 for k, v in a.items()})),
        MERGE,
        ("warning: model 2 rl-2", "is 0"),
    ),
    "links of the hub's cache": Good(in_hub_cache, "merge linear rl-1 models--a--b/snapshots/0f --out out"),
    "a model through a link": Good(lambda root: (root / "here").symlink_to("rl-2"), "merge linear rl-1 here --out out"),
    "a name with unicode": Good(moved("rl-2", "módel-模型"), "merge linear rl-1 módel-模型 --out aus-é"),
    "a name with a leading dash, as a path": Good(moved("rl-2", "-x"), "merge linear rl-1 ./-x --out out"),
    "a configuration with a byte more": Good(edited("rl-2/config.json", lambda data: data + b"\n\n"), MERGE),
    "other files next to the weights": Good(
        both(text("rl-2/README.md", "# x"), text("rl-2/optimizer.bin", b"\x80"), text("rl-2/.cache/x", "y")), MERGE
    ),
    "no manifest": Good(lambda root: (root / "rl-2/gemma2.json").unlink(), MERGE),
    "an empty output folder": Good(lambda root: (root / "out").mkdir(), MERGE),
    "an output in folders to come": Good(nothing, "merge linear rl-1 rl-2 --out a/b/out"),
    "a stale lock": Good(text(".out.lock", ""), MERGE),
    "shown": Good(nothing, "inspect rl-1 --tensors"),
    "an adapter, shown": Good(nothing, "inspect lora"),
    "compared": Good(nothing, "diff rl-1 rl-2 --base base"),
    "verified": Good(nothing, "verify rl-2"),
    "a merge file": Good(nothing, "merge --config merge.yaml --out out"),
    "a recipe": Good(nothing, "sft --config recipe.yaml --out out --dry-run"),
    "a recipe with CRLF and a byte order mark": Good(
        edited("recipe.yaml", lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")),
        "sft --config recipe.yaml --out out --dry-run",
    ),
    "a pipeline": Good(nothing, "pipeline run pipeline.yaml --out out --dry-run"),
    "rows": Good(nothing, DRY.format("chats.jsonl")),
    "rows with CRLF": Good(edited("chats.jsonl", lambda data: data.replace(b"\n", b"\r\n")), DRY.format("chats.jsonl")),
    "rows with a byte order mark": Good(
        edited("chats.jsonl", lambda data: b"\xef\xbb\xbf" + data), DRY.format("chats.jsonl")
    ),
    "rows without a last line end": Good(edited("chats.jsonl", bytes.rstrip), DRY.format("chats.jsonl")),
    "rows with blank lines": Good(
        edited("chats.jsonl", lambda data: data.replace(b"\n", b"\n\n")), DRY.format("chats.jsonl")
    ),
    "rows in gzip": Good(packed(gzip.compress, "rows.jsonl.gz"), DRY.format("rows.jsonl.gz")),
    "rows in a table": Good(nothing, DRY.format("table.csv")),
    "rows in parquet": Good(lambda root: (root / "rows.parquet").write_bytes(parquet()), DRY.format("rows.parquet")),
    "rows of messages": Good(
        text(
            "m.jsonl", '{"messages": [{"role": "user", "content": "é😀"}, {"role": "assistant", "content": "b"}]}\n' * 4
        ),
        DRY.format("m.jsonl"),
    ),
    "control tokens in a text": Good(
        edited("chats.jsonl", lambda data: data.replace(b"It is", b"<end_of_turn>", 1)), DRY.format("chats.jsonl")
    ),
    "pairs": Good(nothing, "reward --model base --data pairs.jsonl --out out --dry-run"),
    "prompts": Good(nothing, "rlhf --policy base --reward rm --prompts prompts.jsonl --out out --dry-run"),
    "prompts, answered": Good(nothing, "generate --teacher base --prompts prompts.jsonl --out out --dry-run"),
    "prompts, measured": Good(nothing, "eval --model rl-1 --sft base --reward rm --prompts prompts.jsonl --dry-run"),
    "prompts, distilled": Good(
        nothing, "distill --model base --teacher rl-1 --prompts prompts.jsonl --out out --dry-run"
    ),
    "rows, filtered": Good(nothing, "filter chats.jsonl --out out"),
}
