"""The whole path on the embedded models, from nothing to a front: every step the suite's own command.

    tiny student and teacher -> teacher data -> filter -> SFT -> distillation -> preference pairs -> reward model
    -> WARP -> front -> report

The directory is visible while it grows; started again, it goes on where it was. Each step is the command that the
screen shows, so that any of them can be repeated by hand with other settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2.configs import recipes
from gemma2.merging.errors import OutputError, UsageError
from gemma2.merging.outputs import MANIFEST, check_output, locked, now, versions, write_json
from gemma2.merging.progress import SILENT, Progress
from gemma2.posttrain.evaluation.reporting.values import title_of

from .config import Config, resolve
from .pipeline import Step, command_line, ensure
from .rundir import RunOptions, RunResult
from .schemas import (
    DistillConfig,
    FilterConfig,
    GenerateConfig,
    PairsConfig,
    QuickstartConfig,
    RewardConfig,
    SftConfig,
    TinyConfig,
    WarpConfig,
)

__all__ = ["JUDGE", "Chapter", "chapters", "run_quickstart"]

JUDGE = "gemma2.posttrain.embedded.tasks:judge_reward"
SCORES = "gemma2.posttrain.embedded.tasks:judge_scores"
# Title, why, command, section of the recipe, folder, and the module and function that run it.
CHAPTERS = (
    (
        "Embedded models",
        "pre-train a small Gemma 2 student and a larger teacher from scratch, on text that gemma2 writes itself",
        *("tiny", "tiny", "models", "embedded.build", "run_tiny"),
    ),
    (
        "Teacher data",
        "the teacher answers the training prompts; truncated answers are dropped",
        *("generate", "generate", "data", "generation.generate", "run_generate"),
    ),
    (
        "Filter",
        "rows that a model should not learn from go, each with its reason: duplicates, held-out questions, ...",
        *("filter", "filter", "clean", "filters.runner", "run_filter"),
    ),
    (
        "SFT",
        "the student learns from the teacher's answers, with the loss on the model's turns only",
        *("sft", "sft", "sft", "training.sft", "run_sft"),
    ),
    (
        "Distillation",
        "the student answers by itself, and learns the teacher's distribution at every token of its answers",
        *("distill", "distill", "distilled", "distillation.distill", "run_distill"),
    ),
    (
        "Preference pairs",
        "the distilled model answers several times; a judge says which answer is better",
        *("reward pairs", "pairs", "pairs", "preferences.pairs", "run_pairs"),
    ),
    (
        "Reward model",
        "a Bradley-Terry model learns the judge's preferences from the pairs",
        *("reward", "reward", "reward", "preferences.train", "run_reward"),
    ),
    (
        "WARP",
        "RL with an EMA anchor, M times; SLERP of the policies; a step back towards the init; I rounds; the front",
        *("warp", "warp", "warp", "warp", "run_warp"),
    ),
)


@dataclass(frozen=True)
class Chapter:
    """One step with its title and the line that explains it."""

    title: str
    why: str
    step: Step


def default_config() -> Path:
    """The recipe that comes with the package."""
    return recipes()["quickstart"]


def chapters(config: QuickstartConfig, root: Path) -> list[Chapter]:
    """All steps with their configurations, validated before the first one runs.

    Raises UsageError for a setting that its step does not take.
    """
    settings = configurations(config, root)
    return [
        Chapter(title, why, Step(command, settings[section], root / folder, _lazy(module, function)))
        for title, why, command, section, folder, module, function in CHAPTERS
    ]


def configurations(config: QuickstartConfig, root: Path) -> dict[str, Any]:
    """The configuration of each step: the recipe's section, and the inputs that follow from the steps before it."""
    models, heldout, prompts = root / "models", root / "models" / "heldout.jsonl", root / "models" / "prompts.jsonl"
    teacher, policy = models / "teacher", root / "distilled"  # RL starts from the distilled student

    def settings(schema: type[Config], section: str, given: dict[str, Any], **fixed: Any) -> Any:
        for key in sorted(given.keys() & fixed.keys()):
            raise UsageError(f"'{section}.{key}' is set by the quickstart itself", "remove it from the recipe")
        return resolve(schema, flags={"seed": config.seed, **given, **fixed}, section=section)

    sizes = {"train_prompts": config.train_prompts, "heldout_prompts": config.heldout_prompts}
    taught = {"model": root / "sft", "teacher": teacher, "prompts": prompts, "heldout": heldout}
    before = {"compare": (models / "student", root / "sft"), "judge_fn": SCORES}
    asked = {"sft": policy, "reward": root / "reward", "prompts": prompts, "heldout": heldout}
    found = [
        settings(TinyConfig, "tiny", {}, **sizes),
        settings(GenerateConfig, "generate", config.generate, teacher=teacher, prompts=prompts),
        settings(FilterConfig, "filter", config.filter, data=root / "data", decontaminate=(heldout,)),
        settings(SftConfig, "sft", config.sft, model=models / "student", data=(root / "clean",)),
        settings(DistillConfig, "distill", config.distill, **taught),
        settings(PairsConfig, "pairs", config.pairs, model=policy, prompts=prompts, judge=JUDGE),
        settings(RewardConfig, "reward", config.reward, model=policy, data=root / "pairs"),
        settings(WarpConfig, "warp", config.warp, **asked, **before),
    ]
    return dict(zip([chapter[3] for chapter in CHAPTERS], found, strict=True))


def _lazy(module: str, function: str) -> Callable[[Any, RunOptions, Progress], RunResult]:
    """A step whose heavy module is imported when it runs, so that a skipped step costs nothing."""

    def run(config: Any, options: RunOptions, progress: Progress) -> RunResult:
        from importlib import import_module

        result: RunResult = getattr(import_module(f".{module}", __package__), function)(config, options, progress)
        return result

    return run


def run_quickstart(
    config: QuickstartConfig,
    out: Path,
    progress: Progress = SILENT,
    announce: Callable[[int, int, Chapter, str], None] | None = None,
) -> dict[str, Any]:
    """Run every chapter that is not done, measure, and write the report.

    Returns {"rows": table rows, "samples": answers before and after, "points": the front, "report": path}.
    """
    plan = chapters(config, out)
    check_place(out)
    started = now()
    with locked(out):
        out.mkdir(parents=True, exist_ok=True)
        for number, chapter in enumerate(plan, start=1):
            if announce:
                announce(number, len(plan), chapter, command_line(chapter.step))
            ensure(chapter.step, progress)
        summary = _summary(out)
        write_json(out / "summary.json", summary)
        write_json(out / MANIFEST, _manifest(config, started, summary))
        from gemma2.posttrain.evaluation.reporting.page import write_report

        summary["report"] = str(write_report(out, out / "report.html"))
        return summary


def check_place(out: Path) -> None:
    """Refuse a directory that holds something else: a quickstart grows in the open and would mix with it."""
    check_output(out, force=True)
    ours = (MANIFEST, "models", ".models.partial")
    if out.exists() and any(out.iterdir()) and not any((out / name).exists() for name in ours):
        raise OutputError(f"--out {out} holds something else", "choose another --out")


def _manifest(config: QuickstartConfig, started: str, summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "command": "quickstart",
        "config": config.model_dump(mode="json"),
        "parents": [],
        "data": [],
        "seed": config.seed,
        "versions": versions(),
        "started": started,
        "ended": now(),
        "status": "complete",
        "summary": {"rows": summary["rows"]},
        "files": {},
    }


def _summary(out: Path) -> dict[str, Any]:
    """The table base, SFT, distilled, best single RL run, WARP 1..I, and answers before and after."""
    front = out / "warp" / "front"
    points = json.loads((front / "front.json").read_text(encoding="utf-8"))["points"]
    chosen = list(_chosen(points))
    samples = [json.loads(line) for line in (front / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "rows": [_row(title, point) for title, point in chosen],
        "samples": _side_by_side(samples, {point["name"]: title for title, point in chosen}),
        "points": points,
    }


def _chosen(points: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was before RL, the single RL run with the highest reward in the first iteration, each iteration's slerp."""
    for kind in ("base", "sft"):
        yield from ((title_of(point), point) for point in points if point["kind"] == kind)
    first = [point for point in points if point["kind"] == "policy" and point["iteration"] == 1]
    yield "best single RL", max(first, key=lambda point: point["reward"])
    yield from ((f"WARP {point['iteration']}", point) for point in points if point["kind"] == "slerp")


def _row(title: str, point: dict[str, Any]) -> dict[str, Any]:
    """A line of the table: each figure with its standard error."""

    def figure(name: str, digits: int, scale: float = 1.0) -> str:
        return f"{point[name] * scale:.{digits}f} ± {point[name + '_se'] * scale:.{digits}f}"

    return {
        "policy": title,
        "reward": figure("reward", 2),
        "KL, nats": figure("kl", 2),
        "judge": figure("judge", 3),
        "accuracy, %": figure("accuracy", 1, 100),
        "length, tokens": f"{point['length']:.1f}",
    }


def _side_by_side(samples: list[dict[str, Any]], titles: dict[str, str], limit: int = 4) -> list[dict[str, str]]:
    """Answers of the chosen policies in the order of the table: [{"prompt": ..., <title>: completion, ...}].

    One prompt of each kind (by its first word), so that the skills show.
    """
    told = {(sample["prompt"][-1]["content"], titles.get(sample["name"])): sample["completion"] for sample in samples}
    kinds: dict[str, str] = {}
    for prompt, _ in told:
        kinds.setdefault(prompt.split()[0], prompt)
    return [
        {"prompt": prompt, **{title: told[prompt, title] for title in titles.values() if (prompt, title) in told}}
        for prompt in list(kinds.values())[:limit]
    ]
