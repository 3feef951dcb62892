"""One self-contained HTML page about a finished run: `gemma2 report`.

No network, no script, readable on a phone and in print, light and dark. Model output is untrusted: every value passes
the template's escaping, and a content policy forbids the page to load anything.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemma2.merging.errors import OutputError

from . import sections
from .collect import Collected, collect
from .values import as_yaml, duration, number, short_hash

__all__ = ["write_report"]

HERE = Path(__file__).parent


def write_report(directory: Path, out: Path) -> Path:
    """Write the page about `directory`, a warp or quickstart output, to the file `out`; returns `out`.

    Replaces an existing file in one rename. What is missing in the directory is said on the page.
    Raises InputError when nothing of ours is in `directory`, OutputError when `out` cannot be written.
    """
    page = render(collect(directory))
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(page, encoding="utf-8")
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write --out {out} ({error.strerror})", "choose another --out") from error
    return out


def render(found: Collected) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "duration": duration, "short": short_hash}
    rows = sections.headline_rows(found)
    return environment.get_template("report.html.j2").render(
        css=(HERE / "report.css").read_text(encoding="utf-8"),
        title=found.root.resolve().name,
        facts=sections.facts(found),
        gaps=found.gaps,
        verdict=sections.verdict(rows),
        table=sections.table(rows),
        front=sections.front_figures(found),
        front_facts=found.front,
        points=[point for point in found.front.get("points", ()) if point["kind"] != "trajectory"],
        stages=sections.stage_list(found),
        angles=sections.angles(found),
        curves=sections.curves(found),
        samples=sections.side_by_side(found, rows),
        lineage=sections.lineage(found),
        configs=[(stage.name, as_yaml(stage.config)) for stage in found.stages if stage.config],
        versions=sections.versions(found),
    )
