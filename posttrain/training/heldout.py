"""The held-out loss during training: when to measure it, the lowest so far, its weights, and when to stop.

    loss = - 1/N sum_t m_t log pi(y_t | y_<t)      over all held-out rows, N: their targets (not a mean over batches)

It is measured before the first step, after every `eval_every` steps and after the last. The lowest loss, the number of
measurements since, and (`keep` best) its weights are part of every checkpoint, so that a resumed run continues with the
same ones. Several processes measure a share of the rows each; the sum is the same on all, and so is what follows from
it. A run that stops early writes no checkpoint at its last step: a resume makes the same decision by itself. The
untrained model is not a candidate; if its loss is lower, a warning is shown.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from gemma2.core.errors import GuardStop, InputError
from gemma2.core.json_files import JsonObject, load_json, write_json
from gemma2.core.progress import Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.core.sizes import apart
from gemma2.posttrain.data.examples import Example
from gemma2.posttrain.models.cross_entropy import summed_cross_entropy
from gemma2.posttrain.models.head import plain_head
from gemma2.posttrain.models.lora import plain_model
from gemma2.posttrain.models.protocols import CausalLM, Network
from gemma2.posttrain.models.sampler import evaluating
from gemma2.posttrain.models.scorer import Pace, head_logps, hidden_states
from gemma2.posttrain.runs.run_directory import Run
from gemma2.posttrain.schemas import RewardConfig, SftConfig
from gemma2.posttrain.sharding.kept_weights import read_weights, save_trained
from gemma2.posttrain.sharding.lockstep import pace_of
from gemma2.posttrain.sharding.units import whole_head

from .witness import measuring

__all__ = ["HeldOut", "heldout_loss"]

STATE_FILE = "heldout.json"
BEST_FILE = "best.safetensors"


@dataclass
class Record:
    """The measurements so far: the last loss and the lowest one, nats per target, and their steps."""

    step: int = 0
    loss: float | None = None
    best_step: int = 0
    best_loss: float | None = None
    without_progress: int = 0


class HeldOut(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Measures the held-out loss and logs it to metrics.jsonl as `heldout_loss`.

    Must be added before `RunCallback`, which marks as complete the checkpoints to which this callback adds files. A
    subclass with other examples than SFT's, another loss or further figures overrides `figures`.
    """

    def __init__(self, run: Run, examples: Sequence[object], config: SftConfig | RewardConfig) -> None:
        self.run = run
        self.examples = examples
        self.config = config
        self.first: JsonObject = {}
        self.initial: float | None = None
        self.record = Record()

    @property
    def best_file(self) -> Path:
        """Return the file of the weights with the lowest loss so far."""
        return self.run.checkpoints / BEST_FILE

    def before(self, model: Network) -> None:
        """Measure the untrained model. Not part of `on_train_begin`, which after a resume gets a trained one."""
        self.first = self.figures(model) if self.examples else {}
        self.initial = self.first.get("heldout_loss")

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.run.ranks.on_main(lambda: self.best_file.unlink(missing_ok=True))
        if state.global_step > 0:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.record = self.run.ranks.on_main(lambda: self._restored(checkpoint))
        elif self.first:
            self.run.log(0, **self.first)

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        every = self.config.eval_every
        # Also at the last step, so that its checkpoint includes it: a run may be killed while its result is written.
        due = state.global_step >= state.max_steps or (every is not None and state.global_step % every == 0)
        if not self.examples or not due:
            return
        self._measure(state.global_step, cast(Network, kwargs["model"]))
        if self.config.patience is not None and self.record.without_progress >= self.config.patience:
            control.should_training_stop = True
            control.should_save = False

    def on_save(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.run.ranks.is_main:
            write_json(checkpoint / STATE_FILE, asdict(self.record))
            if self.best_file.exists():
                _link(self.best_file, checkpoint / BEST_FILE)

    def on_train_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if self.examples and self.record.step != state.global_step:
            self._measure(state.global_step, cast(Network, kwargs["model"]))

    def keep_best(self, model: Network) -> None:
        """Copy the weights with the lowest loss into `model`, unless they are the last ones."""
        if self.config.keep == "best" and self.record.best_step != self.record.step:
            read_weights(model, self.best_file)

    def summary(self, progress: Progress) -> JsonObject:
        """Return the losses for the manifest; warn if training did not lower the loss."""
        record = self.record
        found: JsonObject = {"heldout_loss_before": self.initial, "heldout_loss": record.loss}
        if self.config.keep == "best":
            found |= {"heldout_loss": record.best_loss, "best_step": record.best_step}
        if self.initial is not None and found["heldout_loss"] is not None and found["heldout_loss"] > self.initial:
            before, after = apart(self.initial, found["heldout_loss"])
            progress.warn(f"the held-out loss rose from {before} to {after}: lower --learning-rate, or stop earlier")
        return found

    def figures(self, model: Network) -> JsonObject:
        """Return the figures to log: `heldout_loss`, which the decisions use, and in subclasses further ones."""
        batch_size = self.config.micro_batch_size or self.config.batch_size
        examples = cast(Sequence[Example], self.examples)
        return {"heldout_loss": heldout_loss(cast(CausalLM, model), examples, batch_size, self.run.ranks)}

    def _measure(self, step: int, model: Network) -> None:
        with measuring(model, f"step {step}: the held-out loss", self.run.ranks):
            figures = self.figures(model)
        loss = figures["heldout_loss"]
        if not math.isfinite(loss):
            raise GuardStop(f"step {step}: the held-out loss is {loss}", "lower --learning-rate")
        record = self.record
        record.step, record.loss = step, loss
        if record.best_loss is None or loss < record.best_loss:
            record.best_step, record.best_loss, record.without_progress = step, loss, 0
            if self.config.keep == "best":
                self._save_best(model)
        else:
            record.without_progress += 1
        self.run.log(step, **figures)

    def _save_best(self, model: Network) -> None:
        """Save the trained weights; the file is replaced, not overwritten, since checkpoints may link to it."""
        self.best_file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.best_file.with_suffix(".tmp")
        save_trained(model, aside, self.run.ranks.is_main)
        self.run.ranks.on_main(lambda: aside.replace(self.best_file))

    def _restored(self, checkpoint: Path) -> Record:
        try:
            record = Record(**load_json(checkpoint / STATE_FILE))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"the checkpoint {checkpoint} has no {STATE_FILE}", "start over with --force") from error
        if (checkpoint / BEST_FILE).exists():
            _link(checkpoint / BEST_FILE, self.best_file)
        return record


def _link(source: Path, target: Path) -> None:
    """Link a file under another name, or copy it if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@torch.no_grad()
def heldout_loss(model: CausalLM, examples: Sequence[Example], batch_size: int, ranks: Ranks = ALONE) -> float:
    """Return the mean of -log pi over all target tokens of all examples, nats per token. A collective of `ranks`."""
    model = plain_model(model)
    examples = examples[ranks.share(len(examples))]
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    with evaluating(model), whole_head(model):
        texts = [example.ids for example in examples]
        for batch, hidden in _batches(model, texts, batch_size, pace_of(model, ranks)):
            places = [(row, t) for row, i in enumerate(batch) for t, learned in enumerate(examples[i].mask) if learned]
            rows, positions = torch.tensor(places, device=hidden.device).reshape(-1, 2).unbind(1)
            ids = [examples[batch[row]].ids[t] for row, t in places]
            # The state at position t - 1 predicts token t; the first token, <bos>, is never a target.
            logps = _logps(model, hidden[rows, positions - 1], torch.tensor(ids, device=hidden.device))
            total += logps.double().sum().cpu()
            count += len(ids)
    sums = ranks.gather((total.item(), count))
    return -sum(part for part, _ in sums) / max(sum(targets for _, targets in sums), 1)


def _logps(model: CausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return log pi (N,) fp32 nats of `targets` after last hidden states (N, d)."""
    if plain_head(model) and hidden.dtype == torch.float32 == model.get_output_embeddings().weight.dtype:
        return summed_cross_entropy(model, hidden, targets)[1]
    return head_logps(model, hidden, targets, temperature=1.0)[0]


def _batches(
    model: CausalLM, rows: Sequence[list[int]], batch_size: int, pace: Pace
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (indices, last hidden states (B, T, d) fp32) in batches of similar length."""
    for batch, states in hidden_states(model, rows, [[]] * len(rows), batch_size, pace):
        yield batch, states.float()
