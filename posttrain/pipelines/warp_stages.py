"""WARP (arXiv 2406.16768), Algorithm 1, as stages of a pipeline. Torch-free; nothing is run.

    theta_init <- theta_sft
    for i in 1..I:
        theta_m <- RL from theta_init with the EMA of theta_m as KL anchor, m = 1..M     iteration-i/policy-m
        slerp_i <- SLERP(theta_init, {theta_m}, 1/M)                                     iteration-i/slerp
        theta_init <- (1 - eta) * theta_init + eta * slerp_i                             iteration-i/init
        every policy, slerp_i, and (1 - eta) theta_sft + eta slerp_i, measured           iteration-i/front
    the fronts of all iterations, side by side                                           front
    the chosen point                                                                     model

The policies are merged, never their anchors. LITI goes towards the init of the same iteration; every line of the front
goes from the SFT policy to a slerp, before LITI. The runs of an iteration differ in their seed, which decides prompt
order and samples, and in what `vary` says. With M = 1 (plain RL and LITI) the policy takes the place of the slerp.

Deviations: the paper draws the line of the last slerp; we measure that of every iteration, so that iterations can be
compared and `patience` can end a run whose front no longer improves (the paper: gains fade after iteration 3). It does
not say which point to take: `pick` does.
"""

from __future__ import annotations

from pathlib import Path

from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.posttrain.schemas import Resources, RewardFields, RlFields, StageFile, TrainingFields, WarpConfig
from gemma2.posttrain.schemas.config import parse_value
from gemma2.posttrain.schemas.fields import RowFields

__all__ = ["FIRST_MERGE", "run_seed", "warp_stages"]

FIRST_MERGE = "iteration-1/slerp"  # name of the stage, after the prefix

SHARED = {*TrainingFields.model_fields, *RlFields.model_fields, "strategy"} - {"seed"}


def run_seed(seed: int, iteration: int, policy: int) -> int:
    """The seed of one RL run: distinct for every run of every iteration, recorded in its manifest."""
    return seed * 10_000 + iteration * 100 + policy


def warp_stages(config: WarpConfig, prefix: str = "") -> dict[str, StageFile]:
    """Name -> stage, in the order of Algorithm 1. `prefix` is put in front of their names, also in references."""
    maker = _Algorithm(config, prefix)
    stages: dict[str, StageFile] = {}
    for iteration in range(1, config.iterations + 1):
        stages |= maker.iteration(iteration)
    stages["front"] = maker.front()
    stages["model"] = _stage("pick", {"front": maker.out("front"), "pick": config.pick})
    return {name: stage.model_copy(update={"resources": _reserved(config, stage)}) for name, stage in stages.items()}


def _reserved(config: WarpConfig, stage: StageFile) -> Resources:
    """The resources of a stage: GPUs and machines for RL runs; the others have one GPU where they run a network."""
    if stage.command != "rlhf":
        return Resources(cpus=config.cpus)
    nodes = config.nodes if config.nodes > 1 else None
    return Resources(cpus=config.cpus, gpus=config.gpus_per_policy, nodes=nodes)


def _stage(command: str, options: JsonMapping, when: str | None = None) -> StageFile:
    return StageFile(command=command, options={key: _plain(value) for key, value in options.items()}, when=when)


def _plain(value: object) -> object:
    """A setting as a pipeline file has it."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


class _Algorithm:
    """The stages of one WARP run."""

    def __init__(self, config: WarpConfig, prefix: str) -> None:
        self.config = config
        self.prefix = prefix

    def out(self, name: str) -> str:
        """A reference to a stage's output."""
        return f"${{{self.prefix}{name}.out}}"

    def init(self, iteration: int) -> str:
        """The init of the RL runs of an iteration."""
        return str(self.config.sft) if iteration == 1 else self.out(f"iteration-{iteration - 1}/init")

    def merged(self, iteration: int) -> str:
        """The merge of an iteration: its slerp, or with M = 1 the policy itself."""
        return self.out(f"iteration-{iteration}/{'slerp' if self.config.policies > 1 else 'policy-1'}")

    def policies(self, iteration: int) -> list[str]:
        """The policies of an iteration, in the order of the merge."""
        return [self.out(f"iteration-{iteration}/policy-{m}") for m in range(1, self.config.policies + 1)]

    def iteration(self, i: int) -> dict[str, StageFile]:
        """The stages of one iteration."""
        here, init = f"iteration-{i}", self.init(i)
        when = None
        if i > 1 and self.config.patience:
            when = f"${{{self.prefix}iteration-{i - 1}/front.summary.flat}} < {self.config.patience}"
        found = {f"{here}/policy-{m}": self.policy(i, m, when) for m in range(1, self.config.policies + 1)}
        if self.config.policies > 1:
            found[f"{here}/slerp"] = _stage("merge slerp", {"models": self.policies(i), "base": init})
        found[f"{here}/init"] = _stage("merge liti", {"models": [self.merged(i)], "base": init, "eta": self.config.eta})
        found[f"{here}/front"] = self.iteration_front(i)
        return found

    def policy(self, iteration: int, m: int, when: str | None) -> StageFile:
        """One RL run from this iteration's init; optimizer and anchor start fresh."""
        config = self.config
        options = {
            **_settings(config, SHARED),
            "policy": self.init(iteration),
            "sft": config.sft,
            "prompts": config.prompts,
            "heldout": config.heldout,
            "steps": config.steps_of(iteration),
            "seed": run_seed(config.seed, iteration, m),
            "eval_seed": config.seed,  # as the fronts: a run's evaluations are points of the same plane
            **varied(config, m),
        }
        return _stage("rlhf", options, when)

    def _measured(self) -> JsonObject:
        """The options that all fronts share."""
        config = self.config
        return {
            **_settings(config, {*RewardFields.model_fields, *RowFields.model_fields, "judge_fn"}),
            "sft": config.sft,
            "prompts": config.heldout,
            "temperature": config.temperature,
            "max_new_tokens": config.max_new_tokens,
            "n": config.eval_n,
            "limit": config.eval_limit,
            "seed": config.seed,
            "reference": config.reference,
        }

    def iteration_front(self, i: int) -> StageFile:
        """Every policy, the merge and the line to it; with the fronts of the iterations before."""
        measured = [*self.policies(i), *([self.merged(i)] if self.config.policies > 1 else [])]
        options = {"policies": measured, "merged": self.merged(i), "etas": self.config.etas}
        earlier = {"fronts": [self.out(f"iteration-{i - 1}/front")]} if i > 1 else {}
        return _stage("pareto", {**self._measured(), **options, **earlier})

    def front(self) -> StageFile:
        """The fronts of all iterations, and what they are to be compared with."""
        fronts = [self.out(f"iteration-{i}/front") for i in range(1, self.config.iterations + 1)]
        return _stage("pareto", {**self._measured(), "policies": self.config.compare, "fronts": fronts})


def varied(config: WarpConfig, policy: int) -> JsonObject:
    """The values that `vary` (`KEY=A:B:...`) gives the m-th policy, counted from 1."""
    pairs = (item.partition("=")[::2] for item in config.vary)
    return {key.replace("-", "_"): parse_value(values.split(":")[policy - 1]) for key, values in pairs}


def _settings(config: WarpConfig, names: set[str]) -> JsonObject:
    """The settings of these names, in the order of the schema."""
    return {name: getattr(config, name) for name in WarpConfig.model_fields if name in names}
