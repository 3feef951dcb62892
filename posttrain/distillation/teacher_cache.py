"""A teacher's distributions over fixed data on disk: top k tokens of every response position, the rest as one bucket.

For teachers that do not fit in memory next to the student. `divergence.TopkTarget` states what is lost; the share of
mass in the rest is reported. Per position k + 1 log-probs in fp16 (relative error 2^-11) and k ids in int32:
6 k + 2 bytes; on reading the k + 1 buckets are normalised again, so they are a distribution in fp32.

    topk-00000-of-00002.safetensors   ids, mask, offsets: tokens of the rows, what is learned, where rows begin
                                      top_ids (P, k), logps (P, k + 1): one line per learned token, in order
    cache.json                        its settings, and the digest of every file

Rows are batched by length inside a file, so padding and rounding depend on the batch size, as in any forward pass; the
distributions agree to fp16. A run that was killed goes on at the first file that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject, load_json, write_json
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import read_manifest, require_complete
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import Example
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Prompt, split
from gemma2.posttrain.models.loading import default_device, quiet_libraries
from gemma2.posttrain.models.precision import frozen_dtype, widening
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import length_batches
from gemma2.posttrain.models.scorer import CHUNK
from gemma2.posttrain.provenance.recorded_files import check_recorded, remake
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.schemas.distill import DistillCacheConfig, DistillConfig

from .divergence import Divergence, Head, TopkTarget, head_of
from .responses import collate, fixed_examples, response_states
from .teacher import load_teacher, tokenizer_digest

__all__ = ["CachedTeacher", "TeacherCache", "run_cache", "topk_logps"]

INDEX = "cache.json"
FORMAT = 1


def run_cache(config: DistillCacheConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Write the distributions of `config.teacher` over `config.data` to `options.out`.

    Raises InputError for unusable data or models, UsageError if top k is larger than the vocabulary.
    """
    quiet_libraries()
    with open_run("distill cache", config, options) as run:
        run.origin["attention"] = settle_attention(
            config.attention,
            [config.teacher],
            progress,
            dtype=frozen_dtype(config.teacher_dtype),
            device=default_device(),
            wide=widening({}, config.teacher_dtype, "--teacher-dtype"),
        )
        model, tokenizer = load_teacher(config.teacher, config.teacher_dtype, config.attention)
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        if config.top_k >= vocabulary:
            raise UsageError(f"--top-k {config.top_k} of a vocabulary of {vocabulary} leaves no rest", "lower it")
        reading = Reading(config)
        rows = reading.conversations(config.data, config.limit)
        chat = ChatFormat(tokenizer, model.generation_config)
        examples = fixed_examples(rows, chat, config, reading, progress)
        unread = reading.report(progress, run.path)
        shards = write_shards(run, config, model, examples, progress)
        tokenizer.save_pretrained(run.path)
        positions = sum(shard["positions"] for shard in shards)
        summary = {
            "rows": len(examples),
            "positions": positions,
            "top_k": config.top_k,
            "mean_tail_mass": sum(shard["tail_mass"] for shard in shards) / positions,
        }
        index = {
            "format": FORMAT,
            **summary,
            "vocabulary": vocabulary,
            "tokenizer": tokenizer_digest(tokenizer),
            "distill_temperature": config.distill_temperature,
            "highest_id": max(shard["highest_id"] for shard in shards),
            "files": {shard["name"]: shard["digest"] for shard in shards},
        }
        write_json(run.path / INDEX, index)
        return run.finish(summary | unread)


def write_shards(
    run: Run, config: DistillCacheConfig, model: CausalLM, examples: Sequence[Example], progress: Progress
) -> list[JsonObject]:
    """Write the missing files; returns the facts about each file for the index."""
    total = -(-len(examples) // config.shard_rows)
    shards = []
    run.checkpoints.mkdir(exist_ok=True)
    with progress.task("teacher", total=len(examples), unit="rows") as task:
        for number in range(total):
            rows = examples[number * config.shard_rows : (number + 1) * config.shard_rows]
            name = f"topk-{number:05d}-of-{total:05d}.safetensors"
            path, facts = run.path / name, run.checkpoints / f"{name}.json"
            if not facts.exists():  # written after its file
                tensors = shard_tensors(model, rows, config)
                save_file(tensors, path)
                path.chmod(facts_mode(run.path))
                write_json(facts, {"name": name, "digest": digest_file(path), **facts_of(tensors)})
            shards.append(load_json(facts))
            task.advance(len(rows))
    return shards


def facts_mode(directory: Path) -> int:
    """Permissions of a file as the umask gives them; safetensors writes 0600."""
    return directory.stat().st_mode & 0o666


def facts_of(tensors: dict[str, Tensor]) -> JsonObject:
    """Positions of a file, the teacher's mass outside the top k summed over them, the highest id in it."""
    return {
        "positions": len(tensors["logps"]),
        "tail_mass": tensors["logps"][:, -1].double().exp().sum().item(),
        "highest_id": int(tensors["top_ids"].max()),
    }


@torch.no_grad()
def shard_tensors(model: CausalLM, examples: Sequence[Example], config: DistillCacheConfig) -> dict[str, Tensor]:
    """The content of one file."""
    head = head_of(model, config.distill_temperature)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in length_batches([len(example.ids) for example in examples], config.batch_size):
        ids, mask = collate([examples[i] for i in batch], model.device)
        top_ids, logps = topk_logps(response_states(model, ids, mask), head, config.top_k)
        counts = [sum(examples[i].mask) for i in batch]
        for i, row_ids, row_logps in zip(batch, top_ids.split(counts), logps.split(counts), strict=True):
            found[i] = row_ids.int().cpu(), row_logps.half().cpu()
    ordered = [found[i] for i in range(len(examples))]
    lengths = torch.tensor([0, *(len(example.ids) for example in examples)])
    return {
        "ids": torch.tensor([i for example in examples for i in example.ids], dtype=torch.int32),
        "mask": torch.tensor([learned for example in examples for learned in example.mask]),
        "offsets": lengths.cumsum(0),
        "top_ids": torch.cat([ids for ids, _ in ordered]),
        "logps": torch.cat([logps for _, logps in ordered]),
    }


def topk_logps(hidden: Tensor, head: Head, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable ids (P, k) at hidden states (P, d); log-probs (P, k + 1), the last of all other tokens."""
    size = max(1, CHUNK // len(head.weight))
    parts = []
    for states in hidden.split(size):
        logps = torch.log_softmax(head.logits(states), -1)
        top, ids = logps.topk(k)
        rest = logps.scatter_(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        parts.append((ids, torch.cat([top, rest], -1)))
    return torch.cat([ids for ids, _ in parts]), torch.cat([logps for _, logps in parts])


@dataclass(frozen=True)
class TeacherCache:
    """A finished cache, open for reading. `examples`: its rows; `index`: what cache.json says."""

    path: Path
    index: JsonObject
    shards: list[safe_open]
    examples: list[Example]
    places: list[tuple[int, int, int]]  # of each row: its file, and its lines there

    @classmethod
    def open(cls, path: Path) -> TeacherCache:
        """Read the rows of a cache. Raises InputError if it is not a cache, is unfinished, or has changed."""
        index = read_index(path)
        shards, examples, places = [], [], []
        for number, (name, digest) in enumerate(index["files"].items()):
            file = path / name
            if not file.is_file() or digest_file(file) != digest:
                raise InputError(f"{file} is missing or is not what the cache was written with", "make the cache again")
            shard = safe_open(file, framework="pt")
            shards.append(shard)
            line = 0
            for example in _examples(shard):
                examples.append(example)
                places.append((number, line, line + sum(example.mask)))
                line = places[-1][2]
        return cls(path, index, shards, examples, places)

    @property
    def files(self) -> list[Path]:
        """The facts of the cache that a run which learns from it depends on."""
        return [self.path / INDEX, *(self.path / name for name in self.index["files"])]

    def check(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, config: DistillConfig) -> None:
        """Refuse a student with another tokenizer, or with a head that lacks a token of the cache."""
        if tokenizer_digest(tokenizer) != self.index["tokenizer"]:
            raise InputError(
                f"the tokenizer of {config.model} is not the one of the cache {self.path}",
                "make the cache with a teacher of the same family",
            )
        if self.index["highest_id"] >= vocabulary:
            raise InputError(
                f"the cache {self.path} has token {self.index['highest_id']}, the head of {config.model} "
                f"{vocabulary} rows",
                "use a student whose head is as large as the teacher's",
            )
        if self.index["distill_temperature"] != config.distill_temperature:
            raise UsageError(
                f"the cache {self.path} was made with --distill-temperature {self.index['distill_temperature']:g}",
                "use the same here",
            )

    def split(self, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Numbers of (training, held-out) rows; no prompt is on both sides."""
        keys = [
            Prompt(str(i), [{"role": "user", "content": repr(row.ids[: row.mask.index(True)])}])
            for i, row in enumerate(self.examples)
        ]
        ours, others = split(keys, fraction, seed)
        return [int(key.where) for key in ours], [int(key.where) for key in others]

    def lines(self, row: int) -> tuple[Tensor, Tensor]:
        """ids (P, k) int32 and log-probs (P, k + 1) fp16 of the response positions of a row."""
        number, start, end = self.places[row]
        shard = self.shards[number]
        return shard.get_slice("top_ids")[start:end], shard.get_slice("logps")[start:end]


def read_index(path: Path) -> JsonObject:
    """cache.json of a finished cache."""
    require_complete(path, "--teacher-cache")
    if (read_manifest(path) or {}).get("command") != "distill cache" or not (path / INDEX).is_file():
        raise InputError(f"--teacher-cache {path} is not an output of gemma2 distill cache", "make one, see its --help")
    check_recorded(path, [INDEX], remake("distill cache", path))
    index: JsonObject = load_json(path / INDEX)
    if index["format"] != FORMAT:
        raise InputError(f"{path}/{INDEX} has format {index['format']}, not {FORMAT}", "make the cache again")
    return index


def _examples(shard: safe_open) -> list[Example]:
    ids, mask = shard.get_tensor("ids").tolist(), shard.get_tensor("mask").tolist()
    offsets = shard.get_tensor("offsets").tolist()
    return [Example(ids[start:end], mask[start:end]) for start, end in pairwise(offsets)]


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher that is read from disk. See `gemma2.posttrain.distillation.teacher.Teacher`."""

    cache: TeacherCache
    divergence: Divergence

    @property
    def divided(self) -> bool:
        """See `Teacher`: nothing is computed."""
        return False

    def ready(self) -> AbstractContextManager[None]:
        """See `Teacher`."""
        return nullcontext()

    def target(self, ids: Tensor, mask: Tensor, rows: Tensor) -> TopkTarget:
        """The distributions of rows by number; the k + 1 buckets are normalised in fp32."""
        lines = [self.cache.lines(row) for row in rows.tolist()]
        top_ids = torch.cat([found for found, _ in lines]).long().to(ids.device)
        logps = torch.log_softmax(torch.cat([found for _, found in lines]).float(), -1).to(ids.device)
        return TopkTarget(top_ids, logps, self.divergence)
