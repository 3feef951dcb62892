"""A model of three weights whose training can be followed by hand, and runs of it."""

from contextlib import contextmanager

import torch
from transformers import Trainer
from trl import SFTConfig

from gemma2.core.progress import SILENT
from gemma2.posttrain.models.loading import quiet_libraries
from gemma2.posttrain.runs.run_directory import RunOptions, open_run
from gemma2.posttrain.schemas import TrainingFields
from gemma2.posttrain.training.trainer import RunCallback, metrics_of, train, trainer_arguments

__all__ = ["STEPS", "Bars", "Line", "fit", "metrics_of", "opened", "rows", "trained"]

STEPS = 6


class Line(torch.nn.Module):
    """y = w x, squared loss: a model whose training can be followed by hand."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x, y):  # x (B, 3) fp32, y (B,) fp32
        predicted = x @ self.w
        return {"loss": ((predicted - y) ** 2).mean(), "logits": predicted}


def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=generator)
    return [{"x": row, "y": row.sum()} for row in x]


class Bars:
    """A progress that records its calls, and raises once `stop` steps have passed."""

    def __init__(self, stop=10**9):
        self.stop, self.done, self.reported, self.open = stop, 0, [], 0
        self.notes, self.warnings = [], []
        self.note, self.warn = self.notes.append, self.warnings.append

    def task(self, label, total, unit):
        self.reported.append((label, total, unit))
        return self

    def __enter__(self):
        self.open += 1
        return self

    def __exit__(self, *error):
        self.open -= 1

    def advance(self, amount=1, **fields):
        self.done += amount
        self.reported.append((amount, fields))
        if self.done >= self.stop:
            raise KeyboardInterrupt


@contextmanager
def opened(tmp_path, resume=False, name="out", **settings):
    config = TrainingFields(**({"learning_rate": 0.1, "save_every": 2, "seed": 3} | settings))
    with open_run("sft", config, RunOptions(tmp_path / name, resume=resume)) as run:
        yield config, run


def fit(config, run, progress=SILENT, data=None, model=None, **ours):
    """Train a line; returns its weights."""
    return trained(config, run, progress, data, model, **ours)[0]


def trained(config, run, progress=SILENT, data=None, model=None, **ours):
    """Train a line; returns its weights and the summary of the run."""
    quiet_libraries()
    given = {"max_steps": STEPS, "per_device_train_batch_size": 2, "remove_unused_columns": False} | ours
    arguments = SFTConfig(**trainer_arguments(SFTConfig, config, run, **given))
    model = model or Line()
    trainer = Trainer(model, arguments, train_dataset=data or rows())
    callback = RunCallback(run, progress, "a line")
    trainer.add_callback(callback)
    train(trainer, run, callback)
    return model.w.detach(), callback.summary(model)
