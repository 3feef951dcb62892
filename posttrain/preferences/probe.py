"""A linear probe: the best head of a reward model with a frozen backbone.

    min over w of  mean over pairs of [ -log sigmoid(w . (h_c - h_r) - m) + lambda (w . (h_c + h_r))^2 ] + l2 / 2 |w|^2

h: the last hidden state of a conversation, computed once. This logistic regression on differences of states is convex:
Newton's method in float64, with the step halved until the loss does not rise, reaches the only minimum whatever the
seed. WARM (2401.12187, section 3) starts its reward models from such a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2.core.errors import GuardStop
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.attention.choice import settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import split
from gemma2.posttrain.models.loading import default_device, quiet_libraries, save_model
from gemma2.posttrain.models.protocols import RewardNetwork
from gemma2.posttrain.models.sampler import evaluating
from gemma2.posttrain.models.scorer import hidden_states
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas import ProbeConfig

from .heads import HEAD, starting_model
from .pair_examples import PairIds, tokenise_split
from .train import measure_rewards

__all__ = ["fit_head", "last_states", "run_probe"]

WIDE = "use --attention flex_attention"  # states are fp32: the head is fitted in fp64
STEPS = 100  # Newton's method needs about ten
TOLERANCE = 1e-9  # of the gradient's norm, relative to its norm at w = 0


def run_probe(config: ProbeConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Fit a head on the frozen backbone of `config.model` and write both as a reward model to `options.out`.

    Raises InputError for unusable data or models, GuardStop for states that are not finite.
    """
    quiet_libraries()
    with open_run("reward probe", config, options) as run:
        run.origin["attention"] = settle_attention(
            config.attention, [config.model], progress, device=default_device(), wide=WIDE
        )
        model, tokenizer = starting_model(config.model, config.seed, None, progress, config.attention)
        reading = Reading(config)
        training, heldout = split(reading.pairs(config.data), config.eval_fraction, config.seed)
        chat = ChatFormat(tokenizer)
        pairs, heldout_pairs, dropped = tokenise_split(training, heldout, chat, config.max_length, reading, progress)
        unread = reading.report(progress, run.path)
        states = last_states(model, pairs, config.batch_size, progress)
        margins = torch.tensor([pair.margin or 0.0 for pair in pairs], dtype=torch.float64)
        head, steps = fit_head(states, margins, config.l2, config.center_coefficient)
        with torch.no_grad():
            model.get_parameter(HEAD).copy_(head[None])
        save_model(model, tokenizer, run.path)
        counts = {"newton_steps": steps, "pairs": len(pairs), "heldout_pairs": len(heldout_pairs)}
        found: JsonObject = {}
        if heldout_pairs:
            rewards = last_states(model, heldout_pairs, config.batch_size, progress).double() @ head
            found = measure_rewards(rewards, heldout_pairs)
        return run.finish(counts | dropped | unread | {"train_accuracy": _accuracy(states, head)} | found)


@torch.no_grad()
def last_states(model: RewardNetwork, pairs: Sequence[PairIds], batch_size: int, progress: Progress = SILENT) -> Tensor:
    """Return last hidden states (2, N, d) fp32 on the CPU of both sides at their last tokens, chosen first."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    found = torch.zeros(len(rows), model.config.hidden_size)
    with evaluating(model), progress.task("states", total=len(rows), unit="conversations") as bar:
        for batch, hidden in hidden_states(model, rows, [[]] * len(rows), batch_size):
            last = torch.tensor([len(rows[i]) - 1 for i in batch], device=hidden.device)
            found[batch] = hidden[torch.arange(len(batch), device=hidden.device), last].float().cpu()
            bar.advance(len(batch))
    if not found.isfinite().all():
        raise GuardStop("a hidden state is NaN or infinite", "check the weights of --model")
    return found.view(2, len(pairs), -1)


def fit_head(states: Tensor, margins: Tensor, l2: float, centring: float = 0.0) -> tuple[Tensor, int]:
    """Return w (d,) float64 that minimises the loss above on states (2, N, d), and the number of steps."""
    chosen, rejected = states.double()
    differences, sums = chosen - rejected, chosen + rejected
    n, width = differences.shape
    ridge = l2 * torch.eye(width, dtype=torch.float64) + 2 * centring / n * sums.T @ sums

    def loss(w: Tensor) -> Tensor:
        value: Tensor = -F.logsigmoid(differences @ w - margins).mean() + 0.5 * w @ ridge @ w
        return value

    w = torch.zeros(width, dtype=torch.float64)
    first: float | None = None
    for step in range(STEPS):
        wrong = torch.sigmoid(margins - differences @ w)  # (N,) probability of the other order
        gradient = ridge @ w - differences.T @ wrong / n
        first = first or gradient.norm().item()
        if gradient.norm().item() <= TOLERANCE * first:
            return w, step
        hessian = ridge + (differences * (wrong * (1 - wrong))[:, None]).T @ differences / n
        direction, size = torch.linalg.solve(hessian, gradient), 1.0
        # Close to the minimum the losses of two points are equal to rounding, so a step need not lower the loss.
        while loss(w - size * direction) > loss(w) * (1 + 1e-12) and size > 1e-6:
            size /= 2
        w = w - size * direction
    return w, STEPS


def _accuracy(states: Tensor, head: Tensor) -> float:
    chosen, rejected = states.double() @ head
    return float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean())
