"""Every command that writes an output: its schema, its function, and its command line. Torch-free.

A pipeline names its stages' commands by these names; the function's module is imported when the stage runs.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gemma2.core.json_files import JsonMapping
from gemma2.core.progress import Progress
from gemma2.merging.methods.table import METHODS
from gemma2.posttrain.provenance.origin import hash_of
from gemma2.posttrain.schemas import (
    ConvertConfig,
    DistillCacheConfig,
    DistillConfig,
    ExtractLoraConfig,
    FilterConfig,
    GenerateConfig,
    MergeConfig,
    PairsConfig,
    ParetoConfig,
    PickConfig,
    ProbeConfig,
    ReplaceTokenizerConfig,
    RewardConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    TinyConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config, parse_value
from gemma2.posttrain.schemas.delivery.transfer import PullConfig, PushConfig
from gemma2.posttrain.schemas.fields import REPEATED
from gemma2.posttrain.schemas.measures import ChoicesConfig, PerplexityConfig, QaConfig, SuiteConfig, WinRateConfig

from .run_directory import RunOptions, RunResult

__all__ = ["COMMANDS", "TOOLS", "Command", "Runner", "output_hash", "spell"]

# Any: each function takes the configuration of one command.
Runner = Callable[[Any, RunOptions, Progress], RunResult]


@dataclass(frozen=True)
class Command:
    """One command that writes an output.

    module, function  the function that runs it, below `gemma2.posttrain`
    why               its purpose in one line
    makes             kind of its output: policy, reward model, adapter, data, front, cache, results
    accelerated       whether it runs a network, and so uses a GPU if there is one
    """

    schema: type[Config]
    module: str
    function: str
    why: str
    makes: str = "policy"
    accelerated: bool = True

    @property
    def run(self) -> Runner:
        """The function; reading this property imports its module, and with it torch."""
        runner: Runner = getattr(import_module(f"gemma2.posttrain.{self.module}"), self.function)
        return runner


COMMANDS: dict[str, Command] = {
    "tiny": Command(
        TinyConfig, "tiny.build", "run_tiny", "pre-trains a small Gemma 2 student and a larger teacher from scratch"
    ),
    "convert": Command(
        ConvertConfig, "conversion.convert", "run_convert", "imports a model as plain safetensors", accelerated=False
    ),
    "generate": Command(
        GenerateConfig,
        "generation.generate",
        "run_generate",
        "samples the teacher's answers to the training prompts",
        makes="data",
    ),
    "filter": Command(
        FilterConfig,
        "filters.runner",
        "run_filter",
        "drops rows that a model should not learn from, and lists the reasons",
        accelerated=False,
        makes="data",
    ),
    "sft": Command(
        SftConfig, "sft.sft", "run_sft", "trains the student on the teacher's answers, loss on the model's turns"
    ),
    "distill": Command(
        DistillConfig,
        "distillation.distill",
        "run_distill",
        "trains the student on the teacher's distribution over the student's own answers",
    ),
    "distill cache": Command(
        DistillCacheConfig,
        "distillation.teacher_cache",
        "run_cache",
        "stores the teacher's distributions on disk",
        makes="cache",
    ),
    "reward pairs": Command(
        PairsConfig,
        "preferences.pairs",
        "run_pairs",
        "samples several answers per prompt; a judge says which is better",
        makes="data",
    ),
    "reward": Command(
        RewardConfig,
        "preferences.train",
        "run_reward",
        "trains a Bradley-Terry reward model on preference pairs",
        makes="reward model",
    ),
    "reward probe": Command(
        ProbeConfig,
        "preferences.probe",
        "run_probe",
        "fits a reward head on frozen hidden states, for several reward models to share (WARM)",
        makes="reward model",
    ),
    "reward score": Command(
        RewardScoreConfig, "preferences.score", "run_score", "adds a reward model's score to every row", makes="data"
    ),
    "rlhf": Command(RlhfConfig, "rl.rlhf", "run_rlhf", "RL on the reward, held near a moving average of the policy"),
    **{
        f"merge {name}": Command(MergeConfig, "pipelines.merge_stage", "run_merge", method.why, accelerated=False)
        for name, method in METHODS.items()
    },
    "merge extract-lora": Command(
        ExtractLoraConfig,
        "pipelines.merge_stage",
        "run_extract_lora",
        "writes the difference of a model and its base as a LoRA adapter",
        makes="adapter",
        accelerated=False,
    ),
    "merge replace-tokenizer": Command(
        ReplaceTokenizerConfig,
        "pipelines.merge_stage",
        "run_replace_tokenizer",
        "gives a model another tokenizer",
        accelerated=False,
    ),
    "warp": Command(
        WarpConfig,
        "pipelines.warp",
        "run_warp",
        "runs RL M times, SLERP of the policies and LITI towards the init, I times, then measures the front",
    ),
    "pareto": Command(
        ParetoConfig,
        "evaluation.pareto",
        "run_pareto",
        "measures policies and the line from SFT to the merge on the same held-out prompts",
        makes="front",
    ),
    "eval suite": Command(
        SuiteConfig,
        "evaluation.suite.run_suite",
        "run_suite",
        "measures few-shot benchmarks as Gemma 2's report does",
        makes="results",
    ),
    "eval perplexity": Command(
        PerplexityConfig,
        "evaluation.built_in.perplexity",
        "run_perplexity",
        "measures the perplexity of texts",
        makes="results",
    ),
    "eval qa": Command(
        QaConfig,
        "evaluation.built_in.questions",
        "run_qa",
        "asks questions with known answers, and counts the right ones",
        makes="results",
    ),
    "eval choices": Command(
        ChoicesConfig,
        "evaluation.built_in.multiple_choice",
        "run_choices",
        "scores the choices of questions, and counts the right ones",
        makes="results",
    ),
    "eval win-rate": Command(
        WinRateConfig,
        "evaluation.built_in.win_rate",
        "run_win_rate",
        "compares the answers of two models side by side",
        makes="results",
    ),
    "push": Command(
        PushConfig,
        "transfer.transfer_stages",
        "run_push",
        "copies outputs to another disk or an object store",
        makes="receipt",
        accelerated=False,
    ),
    "pull": Command(
        PullConfig,
        "transfer.transfer_stages",
        "run_pull",
        "fetches an output from another disk or an object store",
        accelerated=False,
    ),
    "pick": Command(
        PickConfig, "evaluation.pick", "run_pick", "writes the chosen point of a front as a model", accelerated=False
    ),
}

TOOLS = ("extract-lora", "replace-tokenizer")  # words after `merge` that are not methods


def output_hash(manifest: JsonMapping) -> str:
    """Return `"blake3:<hex>"` of what a finished output was made from: equal hashes mean equal work."""
    known = COMMANDS.get(str(manifest.get("command")))
    return hash_of(manifest, known.schema if known else None)


def spell(command: str, config: Config, out: Path) -> str:
    """Return the command line of a configuration, with every setting that differs from its default."""
    words = ["gemma2", *command.split()]
    if isinstance(config, PushConfig):
        return shlex.join([*words, config.uri, *map(str, config.outputs)])
    if isinstance(config, PullConfig):
        return shlex.join([*words, config.uri, str(out)])
    if isinstance(config, MergeConfig):  # the method is part of the command, the models are arguments
        words += [str(model) for model in config.models]
    elif isinstance(config, ExtractLoraConfig | ReplaceTokenizerConfig):
        words.append(str(config.model))
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value == field.get_default(call_default_factory=True) or name in config.SPELT_BY_COMMAND:
            continue
        flag = f"--{name.replace('_', '-')}"
        if value is None:  # no flag can express null
            words += ["--set", f"{name}=null"]
        elif isinstance(config, MergeConfig) and _is_nested(value):
            words += [flag, json.dumps(value, ensure_ascii=False)]
        elif isinstance(value, dict):
            words += [word for key, item in value.items() for word in ("--set", f"{name}.{key}={_yaml(item)}")]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple) and field.json_schema_extra == REPEATED:
            words += [word for item in value for word in (flag, str(item))]
        elif isinstance(value, tuple):
            words += [flag, ",".join(str(item) for item in value)]
        else:
            words += [flag, str(value)]
    return shlex.join([*words, "--out", str(out)])


def _is_nested(value: object) -> bool:
    """Whether a value of a merge has rules, gradients or slices in it, which its flag takes as YAML."""
    items = value if isinstance(value, tuple) else (value,)
    return any(isinstance(item, dict | tuple) for item in items)


def _yaml(value: object) -> str:
    """Return the text after `--set KEY=` that is read as this value."""
    plain = str(value)
    return plain if parse_value(plain) == value else json.dumps(value, ensure_ascii=False)
