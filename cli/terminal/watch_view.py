"""The view of `gemma2 watch` as lines of text. Texts of a run are escaped: control characters never reach a terminal.

Lines are built here, for a terminal with a style each; rich only draws them, which keeps a look cheap.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma2.core.outputs.safetensors_header import printable

if TYPE_CHECKING:
    from rich.text import Text

    from gemma2.core.json_files import JsonMapping
    from gemma2.posttrain.watch.view import Details, StageView, View

__all__ = ["ViewLine", "as_text", "view_lines"]

MARKS = {"complete": "✓", "running": "▸", "failed": "✗", "interrupted": "!", "not needed": "-", "blocked": "-"}
STYLES = {"complete": "green", "running": "bold", "failed": "red", "interrupted": "yellow"}
OPEN = ("running", "failed", "interrupted")
ROWS = 24  # stages in full; of more, groups are counted
NEXT = 3  # waiting stages that are named
NAME, COMMAND, STATUS = 32, 14, 12  # columns
TEXT = 600  # characters of a prompt or an answer
LABEL = 20  # columns
SPARK = 40
# name of a metric -> its label, in the order of the lines; the first that exist get a sparkline
DRAWN = {
    "reward": "reward",
    "heldout_reward": "reward, held out",
    "kl": "KL to SFT",
    "kl_anchor": "KL to anchor",
    "loss": "loss",
    "heldout_loss": "loss, held out",
    "divergence": "divergence",
    "accuracy": "accuracy",
}
SMALL = {
    "length": "length",
    "truncated": "truncated",
    "gradient_norm": "gradient norm",
    "clipped": "clipped",
    "learning_rate": "learning rate",
    "entropy": "entropy",
}
SHARES = ("truncated", "clipped")


@dataclass(frozen=True)
class ViewLine:
    """A line and the style that a terminal gives to it."""

    text: str
    style: str = ""


def view_lines(view: View, width: int) -> list[ViewLine]:
    """Return the lines of a view, none wider than `width`, except samples, which are wrapped."""
    lines = [_head(view), *(_stages(view, width) if view.pipeline else _only(view, width))]
    for name, said in view.alerts.items():
        lines += _folded(f"alert in {_safe(name, NAME)}: {_safe(said)}", "bold red", width)
    for details in view.details:
        stage = next((one for one in view.stages if one.name == details.name), None)
        lines += [ViewLine(""), *_details(details, stage if view.pipeline else None, width)]
    return [ViewLine(line.text[:width], line.style) for line in lines]


def as_text(lines: Sequence[ViewLine]) -> Text:
    """Return the lines as rich draws them."""
    from rich.text import Text

    return Text("\n").join(Text(line.text, line.style, no_wrap=True) for line in lines)


def _head(view: View) -> ViewLine:
    parts = [_safe(view.out), view.status]
    if view.pipeline:
        parts.append(f"{view.done} of {len(view.stages)} stages done")
    parts.append(duration(view.elapsed))
    parts.append("" if view.over else _left(view.eta))
    return ViewLine("  ".join(filter(None, parts)), "bold")


def _only(view: View, width: int) -> Iterator[ViewLine]:
    for stage in view.stages:
        parts = [stage.command, _steps(stage)]
        if any(parts):
            yield ViewLine("  ".join(filter(None, parts)))
        if stage.error:
            yield from _folded(stage.error, "red", width)


def _stages(view: View, width: int) -> Iterator[ViewLine]:
    few = len(view.stages) <= ROWS
    waiting = [stage for stage in view.stages if stage.status == "waiting"]
    shown = [stage for stage in view.stages if few or stage.status in OPEN or stage in waiting[:NEXT]]
    names = min(NAME, max((len(_safe(stage.name, NAME)) for stage in shown), default=0))
    for stage in shown[:ROWS]:
        yield _stage(stage, names)
        if stage.error:
            yield from _folded(stage.error, "red", width)
    counts: dict[str, int] = {}
    for stage in [*(one for one in view.stages if one not in shown), *shown[ROWS:]]:
        counts[stage.status] = counts.get(stage.status, 0) + 1
    if counts:
        yield ViewLine("  and " + ", ".join(f"{count} {_safe(status, 20)}" for status, count in counts.items()), "dim")


def _folded(text: str, style: str, width: int) -> Iterator[ViewLine]:
    """A line of an error, escaped, in as many lines as it needs."""
    for line in textwrap.wrap(_safe(text, TEXT), max(20, width - 4)):
        yield ViewLine(f"    {line}", style)


def _stage(stage: StageView, names: int) -> ViewLine:
    mark = MARKS.get(stage.status, "·")
    head = f"{mark} {_safe(stage.name, NAME):<{names}}  {_safe(stage.command, COMMAND):<{COMMAND}}"
    status = f"{_safe(stage.status, STATUS):<{STATUS}}"
    left = _left(stage.pace.eta) if stage.status == "running" else ""
    rest = "  ".join(filter(None, [duration(stage.elapsed), _steps(stage), left]))
    return ViewLine(f"{head} {status} {rest}".rstrip(), STYLES.get(stage.status, "dim"))


def _steps(stage: StageView) -> str:
    pace = stage.pace
    if pace.step is None:
        return ""
    rate = f", {pace.rate:.3g}/s" if pace.rate and stage.status == "running" else ""
    return f"step {pace.step:,} of {pace.steps:,}{rate}"


def _left(eta: float | None) -> str:
    return "time left unknown" if eta is None else f"{duration(eta)} left"


def _details(details: Details, stage: StageView | None, width: int) -> Iterator[ViewLine]:
    figures = details.figures
    if stage is not None:
        step = f"  {_steps(stage)}" if stage.pace.step is not None else ""
        yield ViewLine(f"{_safe(details.name, NAME)}{step}", "bold")
    for name, label in DRAWN.items():
        if name in figures or name in details.curves:
            bars = _spark(details, name, max(8, min(SPARK, width - LABEL - 14)))
            yield ViewLine(f"  {label:<{LABEL}}{_number(figures.get(name)):>10}  {bars}".rstrip())
    small = [f"{label} {_figure(name, figures[name])}" for name, label in SMALL.items() if name in figures]
    yield from (ViewLine(f"  {text}") for text in _filled(small, width - 2))
    near = [one for one in details.guards if one.near]
    for guard in details.guards:
        text = f"  {guard.name} {_number(guard.value)}, limit {_number(guard.limit)}"
        if guard in near:
            yield ViewLine(f"{text}: near", "bold yellow")
    if details.unreadable:
        yield ViewLine(f"  {details.unreadable} lines of metrics.jsonl are not readable", "yellow")
    if details.sample:
        yield from _sample(details.sample, width)


def _spark(details: Details, name: str, width: int) -> str:
    from gemma2.posttrain.watch.curve import sparkline

    return sparkline([value for _, value in details.curves.get(name, ())], width)


def _sample(sample: JsonMapping, width: int) -> Iterator[ViewLine]:
    yield ViewLine(f"  sample at step {_safe(str(sample.get('step')), 12)}", "dim")
    for label, text in (("prompt", prompt_text(sample.get("prompt"))), ("answer", str(sample.get("completion", "")))):
        wrapped = _wrapped(text, width - 12)
        for number, line in enumerate(wrapped):
            yield ViewLine(f"    {label if number == 0 else '':<8}{line}", "cyan" if label == "answer" else "")
    score = [f"{name} {_number(sample[name])}" for name in ("reward", "kl", "length") if name in sample]
    if score:
        yield ViewLine(f"    {'score':<8}{'  '.join(score)}")


def prompt_text(prompt: object) -> str:
    """Return the text of a prompt: as it is, or the contents of its turns."""
    if isinstance(prompt, list):
        return "\n".join(str(turn.get("content", "")) if isinstance(turn, Mapping) else str(turn) for turn in prompt)
    return "" if prompt is None else str(prompt)


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, escaped and cut to `width`."""
    cut = text[:TEXT] + (" ..." if len(text) > TEXT else "")
    size = max(20, width)
    found = []
    for line in cut.split("\n"):
        safe = _safe(line, 10 * TEXT)
        found += [safe[start : start + size] for start in range(0, len(safe), size)] or [""]
    return found


def _filled(parts: Sequence[str], width: int) -> list[str]:
    """The parts in as few lines as hold them."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f"   {part}"
        else:
            lines.append(part)
    return lines


def _safe(text: str, longest: int = 200) -> str:
    return printable(text, longest)


def _figure(name: str, value: float) -> str:
    return f"{100 * value:.3g} %" if name in SHARES and math.isfinite(value) else _number(value)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """A time such as `12 s`, `3 min 05 s` or `2 h 10 min`."""
    from gemma2.posttrain.reports.plots.values import duration as in_words

    return in_words(seconds)
