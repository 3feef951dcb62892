"""Commands whose rows several processes share: each computes its part, rank 0 writes and prints. Torch-free to import.

    torchrun --nproc-per-node 4 -m gemma2.cli.main generate ...

Every process holds the models whole. What is drawn, scored or measured is cut into the batches that one process would
have, and the batches are dealt to the ranks: `generate`, `reward score` and the forms of `eval` with their own seeds or
none give the same bytes with any number of processes, and an interrupted run goes on with another number. `eval` and
`pareto` share the prompts of a chunk, so that their sums are rounded otherwise: the figures agree to 1e-6.

An error of one rank is the error of all (`Ranks.agreed`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from gemma2.core.errors import UsageError
from gemma2.core.ranks import ALONE, RankEnd, Ranks, announced, is_launched, is_main, join
from gemma2.posttrain.schemas import EvalConfig, GenerateConfig, ParetoConfig, RewardEvalConfig, RewardScoreConfig
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import ChoicesConfig, PerplexityConfig, QaConfig, SuiteConfig, WinRateConfig

__all__ = ["SHARED", "as_one", "goes_on_with_any_number", "processes_by_step", "together"]

SHARED: dict[type[Config], str] = {
    GenerateConfig: "generate",
    EvalConfig: "eval",
    ParetoConfig: "pareto",
    RewardScoreConfig: "reward score",
    RewardEvalConfig: "reward eval",
    SuiteConfig: "eval suite",
    PerplexityConfig: "eval perplexity",
    QaConfig: "eval qa",
    ChoicesConfig: "eval choices",
    WinRateConfig: "eval win-rate",
}
# The engine that draws in the process itself; the others are servers, or start processes themselves.
OWN_ENGINE = {GenerateConfig: "transformers", SuiteConfig: "gemma2"}


def goes_on_with_any_number(command: str) -> bool:
    """Whether an interrupted run of a command may go on with another number of processes."""
    return command in SHARED.values()


def processes_by_step(said: str, step: int, processes: int) -> str:
    """Return the line of a run that goes on from `step` with `processes`; "" if all of its steps have the same number.

    said  the line so far, or a number alone. What it has from `step` on is computed again, and is left out.

    >>> processes_by_step("2, from step 4: 1", 6, 4)
    '2, from step 4: 1, from step 6: 4'
    >>> processes_by_step("2, from step 4: 1", 2, 1)
    '2, from step 2: 1'
    """
    parts = re.findall(r"(?:from step (\d+): )?(\d+)", said)
    kept = [(int(start or 0), int(many)) for start, many in parts if int(start or 0) < step]
    if not kept or kept[-1][1] != processes:
        kept.append((step, processes))
    later = "".join(f", from step {start}: {many}" for start, many in kept[1:])
    return f"{kept[0][1]}{later}" if later else ""


def as_one(config: Config) -> AbstractContextManager[object]:
    """A block in which a failure of one process is that of all, where the rows of a command are shared."""
    return together(config) if type(config) in SHARED else nullcontext()


@contextmanager
def together(config: Config) -> Iterator[Ranks]:
    """Meet the other processes of a command that shares its rows.

    Raises UsageError where its engine is not in the process, on rank 0 in words and on the others silently.
    """
    if announced() == 1:
        yield ALONE
        return
    command, own = SHARED[type(config)], OWN_ENGINE.get(type(config))
    engine = getattr(config, "engine", own)
    if engine != own:
        if not is_main() and not is_launched():  # the command that has started them says it once
            raise RankEnd(UsageError.exit_code)
        raise UsageError(
            f"{command} --engine {engine} was started with {announced()} processes",
            f"start it with one: {engine} runs requests side by side itself; --engine {own} takes several",
        )
    ranks = join(command)
    with ranks.agreed():
        yield ranks
