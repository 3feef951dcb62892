"""What a run of the suite will do, and what would stop it, before the model is loaded. Torch-free."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer
from gemma2.posttrain.doctor.checks.finding import Depth
from gemma2.posttrain.doctor.examination import examine
from gemma2.posttrain.planning.durations import UNKNOWN
from gemma2.posttrain.schemas.measures import SuiteConfig

from .chat_choice import uses_chat
from .encoding import Encoder, chat_text
from .prompts import Asked, asked_of
from .task import tasks_of
from .task_rows import TaskRows, read_rows

__all__ = ["check_engine", "check_model", "plan_suite", "refuse_broken", "tables_of"]

LOOKED_AT = 16  # rows of a task whose prompts are encoded for the plan
CONTEXT = 8192  # of Gemma 2, where config.json does not state one
EXTRA = "pip install 'gemma2[eval]', or leave --engine out: gemma2's own engine needs no extra"


def check_engine(config: SuiteConfig) -> None:
    """Raise UsageError for an engine that is not installed. Imports nothing."""
    for module in {"hf": ("lm_eval",), "vllm": ("lm_eval", "vllm")}.get(config.engine, ()):
        if find_spec(module) is None:
            hint = EXTRA if module == "lm_eval" else "pip install 'gemma2[vllm]', or leave --engine out"
            name = module.replace("_", "-")
            raise UsageError(f"--engine {config.engine} needs the package {name}, which is not installed", hint)


def check_model(config: SuiteConfig) -> None:
    """Raise InputError for a model that doctor calls broken, unless `--no-doctor`."""
    if config.doctor:
        refuse_broken(config.model)


def refuse_broken(model: Path) -> None:
    """Raise InputError for a model that `gemma2 doctor --quick` calls broken: its figures would say nothing."""
    for finding in examine([model], Depth.QUICK):
        if finding.status == "problem":
            raise InputError(
                f"gemma2 doctor calls {model} broken: {finding.name}: {finding.message}",
                f"{finding.fix or 'gemma2 doctor shows all'}; --no-doctor measures it as it is",
            )


def tables_of(config: SuiteConfig) -> list[TaskRows]:
    """The rows of every task. Raises InputError for rows that do not fit."""
    return [read_rows(config.data, task, config.limit) for task in tasks_of(config.suite, config.tasks)]


def plan_suite(config: SuiteConfig) -> JsonObject:
    """Rows, prompts and tokens of every task. Raises what the run would."""
    check_engine(config)
    check_model(config)
    tables = tables_of(config)
    tokenizer = load_light_tokenizer(config.model)
    with_chat = uses_chat(config.model, config.chat)
    encoder = None if tokenizer is None else Encoder(tokenizer, CONTEXT)
    rows = []
    for table in tables:
        row: JsonObject = {
            "task": table.task.task,
            "rows": len(table.evaluated),
            "shots": table.task.num_fewshot,
            "split": table.split,
            "fewshot_from": table.fewshot_split,
            "metric": table.task.metric,
        }
        if encoder is not None:
            chat = chat_text(ChatFormat(encoder.tokenizer)) if with_chat else None
            first = TaskRows(table.task, table.evaluated[:LOOKED_AT], table.examples, table.split, table.fewshot_split)
            asked = [*asked_of(first, config.seed, chat, config.fewshot_as_multiturn)]
            mean = _tokens(encoder, asked, config) / len(asked)
            row |= {"tokens_about": round(mean * len(table.evaluated))}
        rows.append(row)
    found: JsonObject = {"chat": with_chat, "tasks": rows, "rows": sum(row["rows"] for row in rows)}
    tokens = sum(row.get("tokens_about", 0) for row in rows)
    return found | ({"tokens_read_about": tokens, "time": UNKNOWN} if tokens else {})


def _tokens(encoder: Encoder, asked: list[Asked], config: SuiteConfig) -> int:
    """Tokens that go through the network: what the choices of a row share once, an answer at its limit."""
    if not asked[0].continuations:
        prompts = encoder.prompts(asked, min(config.max_new_tokens, encoder.length // 2))
        return sum(len(prompt.ids) + config.max_new_tokens for prompt in prompts)
    total = 0
    for row in encoder.choices(asked):
        total += max(len(request.ids) for request in row) + sum(request.targets for request in row[1:])
    return total
