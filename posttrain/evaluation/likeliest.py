"""The likeliest answers of several policies to the same questions, to be read by people.

Figures are of answers that are drawn; at temperature 1 a small network says a strange thing now and then, which reads
as if it could do nothing. What is shown is therefore decoded greedily, and said to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.models.loading import load_policy, quiet_libraries
from gemma2.posttrain.models.sampler import SamplingParams, sample

__all__ = ["likeliest_answers"]


def likeliest_answers(
    models: Mapping[str, Path], questions: Sequence[str], max_new_tokens: int
) -> list[dict[str, str]]:
    """For each question `{"prompt": ..., <name of a model>: its answer, ...}`, decoded greedily.

    Raises InputError for a directory that is not a model.
    """
    quiet_libraries()
    rows: list[dict[str, str]] = [{"prompt": question} for question in questions]
    for name, path in models.items():
        model, tokenizer = load_policy(path)
        chat = ChatFormat(tokenizer, model.generation_config)
        prompts = [chat.prompt_ids([{"role": "user", "content": question}]) for question in questions]
        found = sample(model, prompts, SamplingParams(max_new_tokens, temperature=0.0), chat.stop_ids, chat.stop_ids[0])
        for row, ids in zip(rows, found.ids, strict=True):
            row[name] = chat.decode(ids)
    return rows
