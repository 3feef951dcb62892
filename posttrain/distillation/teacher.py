"""The teacher of a distillation: the check that it has the student's tokens, and its distributions over a batch.

A divergence compares distributions token by token, so vocabulary, ids and chat template must be the same. Heads may be
padded to different sizes: then both softmaxes run over the rows that both heads have, which hold every token.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gemma2.core.errors import InputError
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.schemas.fields import Attention, Dtype
from gemma2.posttrain.sharding.placement import WHOLE, Placement
from gemma2.posttrain.sharding.units import is_sharded, plain_class, whole_head

from .divergence import Divergence, FullTarget, Target, head_of
from .responses import response_states

__all__ = [
    "LiveTeacher",
    "Teacher",
    "check_same_tokenizer",
    "common_vocabulary",
    "load_teacher",
    "tokenizer_digest",
]


class Teacher(Protocol):
    """Something that a student can be compared with."""

    @property
    def divided(self) -> bool:
        """Whether its weights are divided over processes, which then run it in step."""
        ...

    def ready(self) -> AbstractContextManager[None]:
        """Return a context in which targets are made and compared with."""
        ...

    def target(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Target:
        """Distributions at the response positions of a batch, row by row.

        ids: (N, T) right-padded; mask: (N, T) True on the tokens that are learned; rows: (N,) numbers of the rows in
        the fixed data, -1 for completions of the student.
        """
        ...


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that reads the same tokens as the student, frozen and in eval mode."""

    model: CausalLM
    divergence: Divergence
    temperature: float
    vocabulary: int | None  # rows of the head that are compared; None: all

    @property
    def divided(self) -> bool:
        """See `Teacher`."""
        return is_sharded(self.model)

    def ready(self) -> AbstractContextManager[None]:
        """See `Teacher`: the head of a divided one is whole, its layers are gathered as they run."""
        return whole_head(self.model)

    @torch.no_grad()
    def target(self, ids: Tensor, mask: Tensor, rows: Tensor) -> FullTarget:
        """See `Teacher`."""
        hidden = response_states(self.model, ids, mask)
        return FullTarget(hidden, head_of(self.model, self.temperature, self.vocabulary), self.divergence)


def load_teacher(
    path: Path, dtype: Dtype, attention: Attention = "eager", placement: Placement = WHOLE
) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    """A frozen teacher and its tokenizer. Raises InputError for a head that is more than a product and a soft cap."""
    model, tokenizer = placement.frozen_policy(path, frozen_dtype(dtype), attention)
    check_head(model, f"--teacher {path}")
    return model, tokenizer


@torch.no_grad()
def check_head(model: CausalLM, name: str) -> None:
    """Refuse a model whose logits are not those of `Head`: a bias or a scale would be left out in silence."""
    ids = torch.arange(1, 9, device=model.device)[None]
    with whole_head(model):
        own = model(input_ids=ids).logits[0, :-1].float()
        ours = head_of(model).logits(response_states(model, ids, torch.ones_like(ids, dtype=torch.bool)))
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    if (own - ours).abs().max() > tolerance * own.abs().max().clamp(min=1):
        raise InputError(
            f"{name} ({plain_class(model).__name__}) computes its logits in a way that distillation does not know",
            "use a model whose head is one matrix, as in Gemma, Llama or Qwen",
        )


def check_same_tokenizer(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, teacher_name: str, student_name: str
) -> None:
    """Refuse a teacher with other tokens, ids or chat template. A missing template counts as Gemma's."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    if theirs != ours:
        odd = min((token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token)), key=repr)
        raise InputError(
            f"{teacher_name} and {student_name} have different tokens: {odd!r} is {theirs.get(odd, 'missing')} in the "
            f"teacher and {ours.get(odd, 'missing')} in the student",
            "distil from a teacher of the same family, or fine-tune on its completions (gemma2 generate, gemma2 sft)",
        )
    if ChatFormat(teacher).tokenizer.chat_template != ChatFormat(student).tokenizer.chat_template:
        raise InputError(
            f"{teacher_name} and {student_name} have different chat templates",
            "copy the template that both were trained with into both",
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the parts that must be equal: the tokens with their ids, and the chat template."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template], ensure_ascii=True)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def common_vocabulary(teacher: int, student: int, tokens: int) -> int | None:
    """Head rows to compare where sizes differ, None where they do not. Raises InputError when a token has no row."""
    if min(teacher, student) < tokens:
        raise InputError(
            f"the heads of teacher and student have {teacher} and {student} rows for {tokens} tokens",
            "use models whose head covers their tokenizer",
        )
    return None if teacher == student else min(teacher, student)
