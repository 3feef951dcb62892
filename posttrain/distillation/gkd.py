"""The trainer of `gemma2 distill`: TRL's DistillationTrainer with our sampler, our loss and fixed data mixed in.

    L = (1 - lambda) E_{y in data} [D(T || S)] + lambda E_{y ~ S} [D(T || S)]            (GKD, 2306.13649, Algorithm 1)
    D: mean over all response tokens of the optimizer batch; no gradient flows through the sampling

Whether a step is on-policy is drawn once per step; the draws, the prompts and the rows of the whole run follow from the
seed and are written out beforehand, and the completions of a step follow from seed and step. So a resume needs no
further state.

Deviations from TRL 1.16, each on one of its private hooks (tests/posttrain/distillation/test_gkd.py guards them):
1. `_generate_and_score_completions` samples with our sampler, n completions a prompt, or takes rows of the fixed data.
2. `_compute_loss` takes the gradient of each chunk in its forward (`divergence.py`) and reads response positions only;
   TRL projects twice to three times, and on a CPU every position, padding included.
3. TRL gets no teacher: ours may be a cache on disk, and its tokenizer was compared, not only its vocabulary's size.
4. Checkpoints hold no model card; those of a divided model are `sharded_trainer.py`'s.
5. Several processes answer a share of the prompts each, with the random numbers that one process would use for them.

A completion that was cut at the limit is learned from like any other: every one of its prefixes is one that the student
reaches, and no sampled token is a target. So a step in which all
were cut gives a warning, and does not stop the run as in RL.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer

from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.examples import Example
from gemma2.posttrain.data.rows import Prompt, located
from gemma2.posttrain.data.seeds import derived_seed
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import Completions, SamplingParams, random_numbers, sample
from gemma2.posttrain.rl.rloo import prompt_order
from gemma2.posttrain.sharding.units import whole
from gemma2.posttrain.training.one_row import check_bos
from gemma2.posttrain.training.sharded_trainer import RootRedirection, ShardedTrainer

from .divergence import divergence_loss, head_of
from .responses import as_examples, collate, response_states
from .teacher import Teacher

__all__ = ["GkdTrainer", "Loss", "Material", "draw", "schedule"]

CUT_STEPS = 3
SAME = 1e-6  # nats; rounding of a divergence in fp32 is 1e-7


@dataclass(frozen=True)
class Loss:
    """The teacher that the student is compared with, and the divergence."""

    teacher: Teacher
    temperature: float
    vocabulary: int | None  # rows of the head that are compared; None: all


@dataclass
class Material:
    """The data of a run: prompts to answer, and fixed rows with their numbers in the teacher's cache."""

    chat: ChatFormat
    params: SamplingParams
    prompts: Sequence[Prompt]
    examples: Sequence[Example]
    numbers: Sequence[int]
    encoded: dict[int, list[int]] = field(default_factory=dict)  # ids of the prompts met so far

    def prompt_ids(self, index: int) -> list[int]:
        """Token ids of a prompt. Raises InputError with file and line where the template refuses it."""
        if index not in self.encoded:
            with located(self.prompts[index].where):
                self.encoded[index] = self.chat.prompt_ids(self.prompts[index].messages)
            check_bos(self.chat, self.encoded[index])
        return self.encoded[index]


def schedule(
    steps: int, batch_size: int, n: int, material: Material, fraction: float, seed: int
) -> dict[str, list[int]]:
    """Per sequence of the whole run: whether its step is on-policy (0 or 1), and the prompt or row it uses."""
    generator = torch.Generator().manual_seed(derived_seed(seed, -1))
    coins = (torch.rand(steps, generator=generator, dtype=torch.float64) < fraction).long().tolist()
    groups = batch_size // n
    answered = iter(_order(len(material.prompts), sum(coins) * groups, derived_seed(seed, -2)))
    learned = iter(_order(len(material.examples), (steps - sum(coins)) * batch_size, derived_seed(seed, -3)))
    indices: list[int] = []
    for coin in coins:
        indices += (
            [i for i in (next(answered) for _ in range(groups)) for _ in range(n)]
            if coin
            else [next(learned) for _ in range(batch_size)]
        )
    return {"prompt": indices, "on_policy": [coin for coin in coins for _ in range(batch_size)]}


def _order(rows: int, draws: int, seed: int) -> list[int]:
    return prompt_order(rows, draws, seed) if draws else []


def draw(
    model: CausalLM,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seed: int,
    batch_size: int,
    among: tuple[int, int] | None = None,
) -> Completions:
    """Completions of a student; they follow from the seed, not from the batch size.

    among: (prompts of other processes in front of these, prompts of all), which have random numbers too; default: none.
    A student whose weights are divided is made whole meanwhile: a collective.
    """
    before, total = among or (0, len(prompts))
    numbers = random_numbers(total * params.n, params, torch.Generator().manual_seed(seed))
    own = numbers[before * params.n : (before + len(prompts)) * params.n]
    with whole(model):
        if not prompts:
            return Completions()
        pad_id = chat.tokenizer.pad_token_id or 0
        return sample(model, prompts, params, chat.stop_ids, pad_id, None, batch_size, own)


class GkdTrainer(ShardedTrainer, DistillationTrainer):  # type: ignore[misc]  # the library is not typed
    """The student is `plain_model(trainer.model)`. `rows`: of all processes."""

    def __init__(
        self,
        model: CausalLM,
        loss: Loss,
        material: Material,
        rows: dict[str, list[int]],
        args: DistillationConfig,
        progress: Progress = SILENT,
        peft_config: object | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        with warnings.catch_warnings():
            # peft 0.21 asks the model for `is_gradient_checkpointing`, which transformers 5 renamed.
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(
                model=model,
                args=args,
                train_dataset=Dataset.from_dict(rows),
                processing_class=material.chat.tokenizer,
                peft_config=peft_config,
            )
        self.loss = loss
        self.material = material
        self.progress = progress
        self.cut_steps = 0  # in a row
        self.warned = False
        self.teaches = False  # whether the teacher ever differed from the student
        self.largest = 0.0  # divergence of a token in this process's last micro-batch, nats
        self.ranks = ranks
        if self.sharded:
            self._forward_redirection = RootRedirection(plain_model(self.model))

    def _generate_and_score_completions(self, inputs: list[JsonObject]) -> dict[str, Tensor]:
        indices = [row["prompt"] for row in inputs]
        if inputs[0]["on_policy"]:
            examples, numbers = self._answers(indices), [-1] * len(indices)
        else:
            examples = [self.material.examples[i] for i in indices]
            numbers = [self.material.numbers[i] for i in indices]
        self._metrics["train"]["on_policy"].append(inputs[0]["on_policy"])
        ids, mask = collate(examples, self.accelerator.device)
        return {
            "ids": ids,
            "mask": mask,
            "rows": torch.tensor(numbers, device=ids.device),
            "num_items_in_batch": self.accelerator.reduce(mask.sum()),
        }

    def _answers(self, indices: Sequence[int]) -> list[Example]:
        """n completions of the student for each of its prompts, as rows to learn from."""
        step, params = self.state.global_step, self.material.params
        prompts = [self.material.prompt_ids(i) for i in indices[:: params.n]]  # every prompt is repeated n times
        seed = derived_seed(self.args.seed, step)
        among = (len(prompts) * self.ranks.rank, len(prompts) * self.ranks.size)
        with self.accelerator.autocast():
            model, size = plain_model(self.model), self.args.train_batch_size
            drawn = draw(model, self.material.chat, prompts, params, seed, size, among)
        own = (sum(drawn.truncated), sum(map(len, drawn.ids)), len(drawn.ids))
        cut, tokens, count = (sum(parts) for parts in zip(*self.ranks.gather(own), strict=True))
        self._watch(cut / count)
        self._metrics["train"]["truncated"].append(cut / count)
        self._metrics["train"]["length"].append(tokens / count)
        return as_examples(prompts, drawn)

    def _watch(self, truncated: float) -> None:
        """Say once that no completion ends: the student then never meets the end of a turn."""
        self.cut_steps = self.cut_steps + 1 if truncated == 1 else 0
        if self.cut_steps == CUT_STEPS:
            self.progress.warn(
                f"every completion of {CUT_STEPS} steps running was cut at the limit: ends of turns are not learned; "
                "raise --max-new-tokens"
            )

    def _see_teaching(self, largest: float) -> None:
        """Say, at the first step, that the teacher is the student, or a copy of it."""
        self.teaches = largest > SAME
        if not self.teaches and self.state.global_step == 0 and not self.warned:
            self.warned = True
            self.progress.warn(
                "the teacher gives the distributions of the student itself: there is nothing to learn; "
                "check --teacher and --model"
            )

    def compute_loss(
        self,
        model: CausalLM,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a micro-batch, nats per response token of the optimizer batch."""
        loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.teaches:  # not inside the forward pass, in which processes gather weights
            self._see_teaching(max(self.ranks.gather(self.largest)))
        return loss

    def _compute_loss(
        self, unwrapped_student: CausalLM, inputs: dict[str, Tensor], num_items_in_batch: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = int(inputs["mask"].nonzero()[:, 1].max()) + 1  # a micro-batch may be narrower than its batch
        ids, mask = inputs["ids"][:, :width], inputs["mask"][:, :width]
        model = plain_model(unwrapped_student)
        with self.accelerator.autocast(), self.loss.teacher.ready():
            hidden = response_states(model, ids, mask)
            target = self.loss.teacher.target(ids, mask, inputs["rows"])
            head = head_of(model, self.loss.temperature, self.loss.vocabulary)
            measured = divergence_loss(hidden, head, target, 1 / num_items_in_batch.item())
        if not self.teaches:
            self.largest = float(measured.values.detach().abs().max())
        # TRL logs the mean of sum / count over micro-batches: with this count it is the mean over the batch's tokens.
        share = num_items_in_batch / self.args.gradient_accumulation_steps
        return measured.loss, measured.entropies.sum(), share
