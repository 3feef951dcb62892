"""Teacher completions for a file of prompts (Gemma 2 report, section 4: responses mostly from a larger teacher).

Prompts are answered in chunks. A chunk's random numbers follow from the seed and its number alone, and it appears
among the checkpoints in one rename, so a run that was killed and resumed writes the same bytes as one that was not.
Inside a chunk the sampler batches by length; the output is in input order.

    data.jsonl: {"prompt": MESSAGES, "completion": MESSAGES, "finish_reason": "stop" | "length", "tokens": N,
                 "logprob": nats, "sample": i, ...the prompt row's other columns}
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemma2.merging.errors import GuardStop
from gemma2.merging.progress import SILENT, Progress

from .batching import derived_seed
from .chat import ChatFormat
from .data import Prompt, located, read_prompts
from .models import default_device, load_policy
from .rundir import Parent, Run, RunOptions, RunResult, open_run
from .sampler import Completions, SamplingParams, sample
from .schemas import GenerateConfig, PairsConfig
from .sources import data_files, to_line
from .training import quiet_libraries

__all__ = ["Answers", "Sampler", "answer_chunks", "run_generate", "saved_rows"]

CHUNK = 128  # completions between two saves, at least one batch

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Sampler:
    """A model that answers prompts, and how."""

    model: Any
    chat: ChatFormat
    params: SamplingParams
    batch_size: int
    seed: int

    @classmethod
    def load(cls, path: Path, config: GenerateConfig | PairsConfig) -> Sampler:
        """Load a model that only generates: bf16 on an accelerator, fp32 on the CPU."""
        dtype = torch.float32 if default_device().type == "cpu" else torch.bfloat16
        model, tokenizer = load_policy(path, dtype)
        params = SamplingParams(config.max_new_tokens, config.temperature, config.n)
        return cls(model, ChatFormat(tokenizer, model.generation_config), params, config.batch_size, config.seed)

    def answer(self, number: int, rows: Sequence[Prompt], prompts: Sequence[list[int]]) -> Answers:
        """Draw n completions for every prompt of chunk `number`."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, number))
        pad_id = self.chat.tokenizer.pad_token_id or 0
        drawn = sample(self.model, prompts, self.params, self.chat.stop_ids, pad_id, generator, self.batch_size)
        return Answers(
            rows=[rows[i] for i in drawn.prompt_index],
            prompts=[prompts[i] for i in drawn.prompt_index],
            texts=[self.chat.decode(ids).strip() for ids in drawn.ids],
            drawn=drawn,
        )


@dataclass(frozen=True)
class Answers:
    """Completions of one chunk; every list is prompt-major, n per prompt. `prompts` are token ids."""

    rows: list[Prompt]
    prompts: list[list[int]]
    texts: list[str]
    drawn: Completions


def run_generate(config: GenerateConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Let `config.teacher` answer `config.prompts` and write `data.jsonl` to `options.out`.

    Raises InputError for unusable prompts or models, GuardStop when no completion ends before the limit.
    """
    quiet_libraries()
    with open_run(
        "generate", config, options, parents=[Parent("teacher", config.teacher)], data=data_files(config.prompts)
    ) as run:
        rows = read_prompts(config.prompts, config.limit)
        answer_chunks(run, Sampler.load(config.teacher, config), rows, _completion_rows, progress)
        return run.finish(_write(run, config, progress))


def answer_chunks(
    run: Run, sampler: Sampler, rows: Sequence[Prompt], describe: Callable[[Answers], Rows], progress: Progress
) -> None:
    """Answer every prompt, chunk by chunk, and save what `describe` makes of the answers among the checkpoints.

    Chunks that are already there are skipped. Every prompt is rendered before the first draw.
    """
    prompts = _render(sampler.chat, rows)
    n = sampler.params.n
    size = max(1, max(CHUNK, sampler.batch_size) // n)
    run.checkpoints.mkdir(exist_ok=True)
    with progress.task("generate", total=len(rows) * n, unit="completions") as task:
        for number, start in enumerate(range(0, len(rows), size)):
            path, chunk = run.checkpoints / f"chunk-{number:08d}.jsonl", slice(start, start + size)
            if not path.exists():
                _save(path, describe(sampler.answer(number, rows[chunk], prompts[chunk])))
            task.advance(len(prompts[chunk]) * n)


def saved_rows(run: Run) -> Iterator[dict[str, Any]]:
    """The rows of all chunks, in input order."""
    for path in sorted(run.checkpoints.glob("chunk-*.jsonl")):
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def _render(chat: ChatFormat, rows: Sequence[Prompt]) -> list[list[int]]:
    prompts = []
    for row in rows:
        with located(row.where):
            prompts.append(chat.prompt_ids(row.messages))
    return prompts


def _save(path: Path, rows: Rows) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(to_line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _completion_rows(answers: Answers) -> Rows:
    described = []
    drawn = answers.drawn
    for i, (row, text, ids) in enumerate(zip(answers.rows, answers.texts, drawn.ids, strict=True)):
        ours = {
            "prompt": row.messages,
            "completion": [{"role": "assistant", "content": text}],
            "finish_reason": "length" if drawn.truncated[i] else "stop",
            "tokens": len(ids),
            "logprob": round(sum(drawn.logps[i]), 4),
            "sample": i - drawn.prompt_index.index(drawn.prompt_index[i]),
        }
        described.append(ours | {name: value for name, value in row.extra.items() if name not in ours})
    return described


def _write(run: Run, config: GenerateConfig, progress: Progress) -> dict[str, Any]:
    """Write data.jsonl from the chunks, without the truncated completions unless they are wanted; the summary."""
    total = truncated = kept = tokens = empty = 0
    with (run.path / "data.jsonl").open("wb") as file:
        for row in saved_rows(run):
            cut = row["finish_reason"] == "length"
            total, truncated = total + 1, truncated + cut
            if config.keep_truncated or not cut:
                kept, tokens = kept + 1, tokens + row["tokens"]
                empty += not row["completion"][0]["content"]
                file.write(to_line(row))
    limit = f"--max-new-tokens {config.max_new_tokens}"
    if not kept:
        raise GuardStop(f"all {total} completions ran into {limit}", "raise it, or keep them with --keep-truncated")
    if 2 * truncated > total:
        progress.warn(f"{truncated} of {total} completions ran into {limit}; raise it to keep more of the data")
    return {
        "completions": total,
        "rows": kept,
        "truncated": truncated,
        "empty": empty,
        "mean_tokens": round(tokens / kept, 2),
    }
