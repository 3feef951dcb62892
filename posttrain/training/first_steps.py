"""What ran is what was asked: the first two optimizer steps of every training are compared with its recipe.

A training that learns nothing, or something else, often ends without an error. Each of these ends the run instead,
before its third step (after a resume the same again):

    start      a resume that is not at its checkpoint; weights that no optimizer holds, or that are not fp32
    gradient   none reaches the trained weights, or none reaches the adapters
    update     a learning rate of 0 in both steps; no weight changed; no adapter changed; a frozen weight changed

Weights are compared by samples, at most 2^10 elements of a tensor, evenly spaced. Of a model that is divided over
processes each samples its part, and what one of them has seen counts for all: they end together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma2.core.errors import GuardStop
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.models.protocols import Network
from gemma2.posttrain.sharding.units import local

__all__ = ["STEPS", "FirstSteps", "always"]

STEPS = 2
SAMPLE = 2**10  # elements per tensor
REPORT = "nothing was saved; check --config and the versions of the libraries, or report it"
# An Adam step moves an element by about the learning rate, whatever the gradient, if that is far above Adam's epsilon;
# a change of less than a rounding error of the element may be lost.
FELT = 100  # epsilons
ROUNDING = 2**-20  # of an element


def always() -> bool:
    """Every step has something to learn."""
    return True


class FirstSteps(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Watches the first optimizer steps after a start or a resume.

    begins     the step that the training goes on from, 0 or that of its checkpoint
    has_signal whether the step that was just computed has anything to learn from; a batch of RL may have none
    ranks      the processes that take the steps together
    """

    def __init__(self, label: str, begins: int, has_signal: Callable[[], bool] = always, ranks: Ranks = ALONE) -> None:
        self.label = label
        self.ranks = ranks
        self.begins = begins
        self.has_signal = has_signal
        self.left = STEPS
        self.trained: dict[str, Tensor] = {}  # samples from before the first step
        self.frozen: dict[str, Tensor] = {}
        self.learning: set[str] = set()  # trained tensors that had a gradient
        self.felt: dict[str, Tensor] = {}  # where in their samples an Adam step must be seen
        self.rates: list[float] = []
        self.signals = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step != self.begins:
            raise self._stop(f"the run goes on at step {state.global_step}, its checkpoint is of step {self.begins}")
        parameters = dict(cast(Network, kwargs["model"]).named_parameters())
        learned = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not learned:
            raise self._stop("no weight is trained")
        groups = cast(torch.optim.Optimizer, kwargs["optimizer"]).param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
        left_out = [name for name, parameter in learned.items() if id(parameter) not in held]
        if left_out:
            raise self._stop(f"the optimizer does not hold {_named(left_out)}")
        narrow = [name for name, parameter in learned.items() if parameter.dtype != torch.float32]
        if narrow:
            raise self._stop(f"trained weights are {parameters[narrow[0]].dtype}, not fp32: {_named(narrow)}")
        self.trained = {name: _sample(parameter) for name, parameter in learned.items()}
        self.frozen = {name: _sample(parameter) for name, parameter in parameters.items() if name not in learned}

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.left:
            return
        self.rates.append(
            max(float(group["lr"]) for group in cast(torch.optim.Optimizer, kwargs["optimizer"]).param_groups)
        )
        if not self.has_signal():
            return
        self.signals += 1
        found = _gradients(cast(Network, kwargs["model"]))
        having = self._of_all(found.keys())
        self.learning |= having
        adapters = {name for name in self.trained if _is_adapter(name)}
        for names, what in ((self.trained.keys(), "trained weights"), (adapters, "adapters")):
            if names and not having & names:
                raise self._stop(f"step {state.global_step + 1}: no gradient reaches the {what}: {_named(names)}")
        if "adam" not in str(args.optim).lower():
            return
        for name, gradient in found.items():
            felt = _sample(gradient).abs() > FELT * args.adam_epsilon
            self.felt[name] = felt & self.felt.get(name, felt)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.left:
            return
        self.left -= 1
        parameters = dict(cast(Network, kwargs["model"]).named_parameters())
        changed = self._of_all(
            name for name, before in self.frozen.items() if not torch.equal(before, _sample(parameters[name]))
        )
        step = f"step {state.global_step + 1}"
        if changed:
            raise self._stop(f"{step}: frozen weights changed: {_named(changed)}")
        if self.left:
            return
        if not any(self.rates):
            raise self._stop(f"{step}: the learning rate is 0 in the first {STEPS} steps")
        self._check_moved(parameters, step)
        self.trained, self.frozen, self.felt = {}, {}, {}

    def _check_moved(self, parameters: Mapping[str, nn.Parameter], step: str) -> None:
        """Stop if nothing moved that had to: a step that is lost in rounding is reported at the end of the run."""
        if not self.signals:
            return
        moved = {name for name in self.learning if not torch.equal(self.trained[name], _sample(parameters[name]))}
        still = self.learning - self._of_all(moved)
        must = self._of_all(name for name in still if self._must_move(name))
        adapters = {name for name in self.learning if _is_adapter(name)}
        for names, what in ((self.learning, "weight"), (adapters, "adapter")):
            if names and names <= still and names & must:
                raise self._stop(f"{step}: no {what} changed in the first {STEPS} steps: {_named(names)}")

    def _must_move(self, name: str) -> bool:
        """Whether an Adam step on a tensor cannot be lost in rounding."""
        felt = self.felt.get(name)
        return felt is not None and bool((self.trained[name][felt].abs() * ROUNDING < max(self.rates)).any())

    def _of_all(self, names: Iterable[str]) -> set[str]:
        """Return the names that any process has found."""
        return set().union(*self.ranks.gather(set(names)))

    def _stop(self, what: str) -> GuardStop:
        return GuardStop(f"{self.label}: {what}", REPORT)


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _gradients(model: Network) -> dict[str, Tensor]:
    """The gradients that are not zero, by name."""
    trained = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None)
    found = {name: local(gradient) for name, gradient in trained}
    # Of most tensors the sample says it: a pass over all gradients would be 2 % of a step.
    return {name: gradient for name, gradient in found.items() if _sample(gradient).any() or gradient.any()}


def _sample(tensor: Tensor) -> Tensor:
    flat = local(tensor.detach()).reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLE))].clone()


def _named(names: Iterable[str]) -> str:
    first = sorted(names)
    return first[0] + (f" and {len(first) - 1} more" if len(first) > 1 else "")
