"""One self-contained HTML page about a run, finished or not: `gemma2 report`.

No network, no script, readable on a phone and in print, light and dark. Model output is untrusted: every value passes
the template's escaping, and a content security policy keeps the page from loading anything.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.text_file import write_text

from . import family, headline, sections
from .collect import Collected, collect
from .plots.gains import CHOICE_NOTE
from .plots.values import duration, number, short_hash

if TYPE_CHECKING:
    import jinja2

__all__ = ["plan_report", "write_report"]

HERE = Path(__file__).parent


def write_report(directory: Path, out: Path) -> Path:
    """Write the page about `directory`, the output of a pipeline or of a command, to the file `out`; returns `out`.

    Replaces an existing file in one rename. The page says what is missing in the directory.
    Raises InputError if `directory` holds no output of ours, OutputError if `out` cannot be written.
    """
    return write_text(out, render(collect(directory)))


def plan_report(directory: Path) -> JsonObject:
    """What the page about a directory would show, and what would be missing on it. Raises like `write_report`."""
    found = collect(directory)
    return {
        "stages": len(found.stages),
        "fronts": len(found.fronts),
        "points": len(found.front.points),
        "curves": len(found.curves),
        "missing": list(found.gaps),
    }


@cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "duration": duration, "short": short_hash}
    return environment.get_template("report.html.j2")


def render(found: Collected) -> str:
    """The page as HTML."""
    rows = headline.headline_rows(found)
    gaps = list(found.gaps)
    from .benchmarks import benchmarks as benchmarks_of  # imports numpy, which a folder without results need not

    benchmarks = benchmarks_of(found, gaps)
    return _template().render(
        css=(HERE / "report.css").read_text(encoding="utf-8"),
        title=found.title,
        facts=headline.facts(found),
        gaps=gaps,
        benchmarks=benchmarks,
        verdict=headline.verdict(rows),
        same=headline.same_as_start(found.front),
        table=headline.table(rows),
        best=headline.best_within(found.front),
        choice_note=CHOICE_NOTE,
        areas=headline.areas(found),
        points=headline.point_table(found),
        front=sections.front_figures(found),
        curved=any(point["kind"] == "trajectory" for point in found.front.points),
        merges=headline.merges(found.front),
        prompts=headline.answers(found.front),
        evaluated=sections.evaluated_on(found),
        stages=sections.stage_list(found),
        angles=sections.angles(found),
        curves=sections.curves(found),
        samples=sections.side_by_side(found, rows),
        graph=family.family(found),
        lineage=family.lineage(found),
        configs=sections.settings(found),
        versions=sections.versions(found),
    )
