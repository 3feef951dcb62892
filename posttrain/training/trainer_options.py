"""The user's `trainer:` mapping, checked by name against TRL's options, without TRL. Torch-free.

    known   the fields of TRL's config class and of transformers' TrainingArguments, read from their source
    unused  options for parts that are done outside TRL
    ours    options that a flag of the command sets

`trainer.py` checks the same when TRL is loaded, against the classes themselves; tests/posttrain/training compare both.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.posttrain.foreign.counterparts import hint_for
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig, TrainingFields, WarpConfig
from gemma2.posttrain.schemas.config import Config, closest

__all__ = ["EVERYWHERE", "OPTIONS", "TrlOptions", "check_trainer_options", "refuse_options"]

# Options of transformers that would break a guarantee of the suite.
SPLIT = "--strategy decides how several processes hold a model"
BREAKS = {
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), SPLIT),
    "save_only_model": "a resumed run would start with a fresh optimizer",
    "ignore_data_skip": "a resumed run would train on its first rows again",
    "logging_strategy": "metrics.jsonl is always written; --log-every sets how often",
}
INSTEAD = {SPLIT: "leave it out, and give --gpus N --strategy fsdp"}
BASES = (("transformers", "training_args.py", "TrainingArguments"), ("trl", "trainer/base_config.py", "_BaseConfig"))
# Options whose values are names, and the enumeration that has them.
NAMED = {
    "optim": ("transformers", "training_args.py", "OptimizerNames"),
    "lr_scheduler_type": ("transformers", "trainer_utils.py", "SchedulerType"),
}
EIGHT_BIT = re.compile(r"bnb|8bit|4bit")
EVERYWHERE = frozenset(
    (
        *("output_dir", "learning_rate", "max_grad_norm", "save_strategy", "save_steps", "save_total_limit"),
        *("logging_steps", "logging_nan_inf_filter", "seed", "data_seed", "report_to", "disable_tqdm", "max_steps"),
        *("warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "ddp_find_unused_parameters"),
    )
)


@dataclass(frozen=True)
class TrlOptions:
    """The options of TRL's config class of one command.

    unused        options of parts that ours replace; of RL with `all_own` every option that TRL adds to transformers'
    """

    file: str
    name: str
    unused: frozenset[str] = frozenset()
    ours: frozenset[str] = frozenset()
    all_own: bool = False

    @property
    def source(self) -> tuple[str, str, str]:
        """Package, file and name of the class."""
        return "trl", self.file, self.name

    def known(self) -> frozenset[str]:
        """The names of all options that the class takes."""
        return frozenset().union(*(_fields(*base) for base in (*BASES, self.source)))

    def without_effect(self) -> frozenset[str]:
        """The options that would change nothing."""
        own = self.known() - _fields(*BASES[0]) if self.all_own else frozenset()
        return self.unused | own


SFT = TrlOptions(
    "trainer/sft_config.py",
    "SFTConfig",
    frozenset(
        (
            *("assistant_only_loss", "completion_only_loss", "chat_template_path", "dataset_num_proc"),
            *("dataset_text_field", "eos_token", "pad_token", "packing_strategy", "shuffle_dataset"),
            *("truncation_mode", "trust_remote_code", "train_sampling_strategy"),
        )
    ),
    frozenset(("num_train_epochs", "max_length", "packing", "dataset_kwargs")),
)
REWARD = TrlOptions(
    "trainer/reward_config.py",
    "RewardConfig",
    frozenset(
        (
            *("chat_template_path", "dataset_num_proc", "disable_dropout", "eos_token", "model_init_kwargs"),
            *("pad_token", "pad_to_multiple_of", "train_sampling_strategy", "trust_remote_code"),
        )
    ),
    frozenset(("num_train_epochs", "max_length", "center_rewards_coefficient")),
)
DISTILL = TrlOptions(
    "trainer/distillation_config.py",
    "DistillationConfig",
    frozenset(
        (
            *("beta", "top_p", "top_k", "min_p", "repetition_penalty"),
            *("teacher_model_name_or_path", "trust_remote_code"),
        )
    ),
    frozenset(("max_completion_length", "temperature", "disable_dropout", "shuffle_dataset", "weight_decay")),
)
RL = TrlOptions(
    "trainer/rloo_config.py",
    "RLOOConfig",
    # Noise would update another policy than the sampled one.
    frozenset(("num_train_epochs", "neftune_noise_alpha")),
    frozenset(
        (
            *("steps_per_generation", "num_iterations", "num_generations", "max_completion_length", "temperature"),
            *("beta", "disable_dropout", "shuffle_dataset", "lr_scheduler_type", "weight_decay"),
        )
    ),
    all_own=True,
)
OPTIONS: dict[type[Config], TrlOptions] = {
    SftConfig: SFT,
    RewardConfig: REWARD,
    DistillConfig: DISTILL,
    RlhfConfig: RL,
    WarpConfig: RL,
}


def check_trainer_options(config: Config) -> None:
    """Raise UsageError for a key of `trainer:` that the command's trainer does not take."""
    options = OPTIONS.get(type(config))
    if options is None or not isinstance(config, TrainingFields) or not config.trainer:
        return
    refuse_options(config, options.known(), options.without_effect(), EVERYWHERE | options.ours)
    types = dict(chain.from_iterable(_annotations(*base).items() for base in (*BASES, options.source)))
    for key, value in config.trainer.items():
        _check_value(key, value, types.get(key, ""))


def _check_value(key: str, value: object, annotation: str) -> None:
    """Refuse a name that is not among those that transformers knows, and a text in the place of a number."""
    known = _members(*NAMED[key]) if key in NAMED else frozenset()
    if known and isinstance(value, str) and value not in known:
        raise UsageError(f"'trainer.{key}' is {value!r}, which transformers does not know", closest(value, known))
    if key == "optim" and EIGHT_BIT.search(str(value)) and find_spec("bitsandbytes") is None:
        raise UsageError(f"'trainer.optim' {value} needs the package bitsandbytes", "pip install bitsandbytes")
    numbers = {"float", "int", "bool"}
    if isinstance(value, str) and {part.strip() for part in annotation.split("|")} - {"None"} <= numbers and annotation:
        kinds = " or ".join(sorted(numbers.intersection(part.strip() for part in annotation.split("|"))))
        raise UsageError(f"'trainer.{key}' is the text {value!r}", f"give a value of type {kinds}")


def refuse_options(
    config: TrainingFields, known: Collection[str], unused: Collection[str], ours: Collection[str]
) -> None:
    """Raise UsageError for an option that TRL does not have, that a flag sets, or that would have no effect."""
    # The deprecated aliases are refused: activation_checkpointing would silently override them.
    taken = {name for name in known if not name.startswith("gradient_checkpointing")}
    for key, value in config.trainer.items():
        counterpart = hint_for(key, type(config).model_fields, value, config.trainer, "sets")
        if key not in taken:
            raise UsageError(f"unknown key 'trainer.{key}'", counterpart or closest(key, taken.difference(unused)))
        if key.startswith("hub_") or key == "push_to_hub":  # settings are recorded, but a token is secret
            raise UsageError(f"'trainer.{key}' is not accepted", "push the finished output with `hf upload`")
        if key in BREAKS:
            raise UsageError(
                f"'trainer.{key}' is not accepted: {BREAKS[key]}", INSTEAD.get(BREAKS[key], "leave it out")
            )
        if key in unused or key.startswith("eval_"):
            raise UsageError(f"'trainer.{key}' has no effect here", "see --help for the options of this command")
        if key in ours:
            hint = counterpart or "use that option, see --help"
            raise UsageError(f"'trainer.{key}' is set by an option of this command", hint)


def _fields(package: str, file: str, name: str) -> frozenset[str]:
    return frozenset(_annotations(package, file, name))


@cache
def _annotations(package: str, file: str, name: str) -> dict[str, str]:
    """The fields that a dataclass takes, and their types, from its source: importing it would import torch."""
    found = [node for node in _body(package, file, name) if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in found
        if isinstance(node.target, ast.Name) and not _is_internal(node.value)
    }


@cache
def _members(package: str, file: str, name: str) -> frozenset[str]:
    """The values of an enumeration of texts, from its source."""
    values = [node.value for node in _body(package, file, name) if isinstance(node, ast.Assign)]
    return frozenset(
        value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)
    )


def _body(package: str, file: str, name: str) -> list[ast.stmt]:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8")
    return next(node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)


def _is_internal(value: ast.expr | None) -> bool:
    """Whether a field is `field(init=False)`."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(one.arg == "init" and ast.unparse(one.value) == "False" for one in keywords)
