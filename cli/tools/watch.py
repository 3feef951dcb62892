"""`gemma2 watch`"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, Quiet
from gemma2.core.errors import AlertStop, InputError, UsageError

if TYPE_CHECKING:
    from gemma2.core.json_files import JsonObject
    from gemma2.posttrain.watch.following import Following
    from gemma2.posttrain.watch.view import View

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

INTERVAL = 1.0  # seconds between two looks
FIGURES = 15.0  # seconds between two blocks outside a terminal, while only figures change
PIPE_WIDTH = 120  # columns outside a terminal


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def watch(
    out: Path = typer.Argument(
        metavar="OUT",
        help="The --out of a pipeline, of warp or of one command: while it runs, before, or afterwards.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    alert: list[str] | None = typer.Option(
        None,
        "--alert",
        metavar="TEXT",
        help="End the stage whose metric makes this hold, as in `kl > 20`; repeatable. Then the exit code is 4.",
        show_default=False,
        rich_help_panel="Settings",
    ),
    page: bool = typer.Option(
        False, "--page", help="Show it as a page in the browser, for this machine only.", rich_help_panel="Settings"
    ),
    port: int | None = typer.Option(
        None,
        "--port",
        metavar="INT",
        min=1,
        max=65535,
        help="Port of the page [default: a free one].",
        show_default=False,
        rich_help_panel="Settings",
    ),
    once: bool = typer.Option(
        False,
        "--once",
        help="Show it once and end; with --json one document. Without --once, --json prints a line for each change.",
        rich_help_panel="Settings",
    ),
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Follow a pipeline or a run: stages with the time left, reward, KL, lengths, guards, the newest sample.

    Ends when the run has ended. Ctrl-C ends the watching, never the run.

    \b
      gemma2 watch runs/align
      gemma2 watch runs/align --page
      gemma2 watch runs/rl --alert "kl > 20" --alert "truncated > 0.5"
    """  # fmt: skip
    from gemma2.posttrain.watch.alerts import parse_alert
    from gemma2.posttrain.watch.following import Following

    if port is not None and not page:
        raise UsageError("--port is for --page", "give that too, or drop it")
    if page and (once or as_json):
        raise UsageError(f"--page and {'--once' if once else '--json'} exclude each other", "drop one")
    if once and alert:
        raise UsageError("--alert watches, --once looks once", "drop one")
    console = Console(as_json=as_json, quiet=quiet)
    following = Following(out, [parse_alert(text) for text in alert or ()])
    if once:
        show_once(console, following)
        return
    with ExitStack() as stack:
        show = stack.enter_context(shown(console, following, page, port))
        last = follow(console, following, show)
        if page and not following.said:
            console.note("the run is over; the page stays until Ctrl-C")
            while True:
                time.sleep(3600)
    following.check_at_the_end()
    if following.said:
        raise AlertStop(*verdict(following, last))


def show_once(console: Console, following: Following) -> None:
    """Print one view. Raises InputError if nothing exists."""
    from gemma2.posttrain.watch.watched_output import nothing_there

    view = following.look(time.time())
    if view is None:
        raise InputError(nothing_there(following.out), "start it, or give the --out of a run or of a pipeline")
    if console.as_json:
        console.json(view.document())
    else:
        show_block(console, view)


def follow(console: Console, following: Following, show: Show) -> View:
    """Look until the run is over; return the last view."""
    from gemma2.posttrain.watch.watched_output import nothing_there

    said = False
    while True:
        view = following.look(time.time())
        if view is None:
            if not said:
                said = True
                console.note(f"{nothing_there(following.out)}; waiting for it (Ctrl-C ends that)")
        else:
            show.view(view)
            if view.over:
                return view
        time.sleep(INTERVAL)


def verdict(following: Following, last: View) -> tuple[str, str]:
    """What an alert did, and how to go on, for the line of the error."""
    from gemma2.posttrain.watch.watched_output import is_interrupted

    name, said = next(iter(following.said.items()))
    status = next((stage.status for stage in last.stages if stage.name == name), "")
    others = f" ({len(following.said) - 1} more alerts)" if len(following.said) > 1 else ""
    if status == "complete":
        return f"alert in {name}: {said}{others}", "it was complete before it read the alert"
    what = f"alert in {name}: {said}; it was ended{others}"
    again = "the same command with --resume" if is_interrupted(Path(last.out)) else "the same command"
    if not following.has_kept(name):
        return what, f"it had no checkpoint yet: {again} starts it again"
    return what, f"its last checkpoint is kept: {again} goes on from there"


class Show:
    """Shows views as blocks of text, each time something changes; with --json as a line of JSON each."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.before: tuple[object, object] | None = None
        self.at = 0.0

    def view(self, view: View) -> None:
        """Show a view, if it differs from the one before."""
        stages = [(stage.name, stage.status) for stage in view.stages], view.status, view.over, dict(view.alerts)
        found = stages, [(one.figures, one.sample) for one in view.details]
        steps = [stage.pace.step for stage in view.stages]
        if self.console.as_json:
            if self.before != (found, steps):
                self.before = found, steps
                self.console.json_line(view.document())
            return
        due = self.before is None or self.before[0] != stages
        if due or (self.before != found and time.monotonic() - self.at >= FIGURES):
            if self.before is not None:
                self.console.text("")
            self.before, self.at = found, time.monotonic()
            show_block(self.console, view)


class ShowLive(Show):
    """Redraws the view in place, on a terminal."""

    def view(self, view: View) -> None:
        """Redraw the view."""
        from gemma2.cli.terminal.watch_view import view_lines

        self.console.redraw(view_lines(view, self.console.width(PIPE_WIDTH)))


class ShowPage(Show):
    """Keeps the view for the page."""

    def __init__(self, console: Console, out: Path) -> None:
        super().__init__(console)
        self.document: JsonObject = {"out": str(out), "waiting": "does not exist yet"}

    def view(self, view: View) -> None:
        """Keep the view."""
        self.document = view.document()


@contextmanager
def shown(console: Console, following: Following, page: bool, port: int | None) -> Iterator[Show]:
    """How views are shown while the block runs."""
    if page:
        from gemma2.posttrain.watch.page_server import PageServer

        kept = ShowPage(console, following.out)

        def stage(name: str) -> JsonObject | None:
            found = following.details(name)
            return found.document(curves=True) if found else None

        with PageServer(lambda: kept.document, stage, port) as server:
            console.text(server.url)
            sys.stdout.flush()
            console.note("the page is for this machine only; Ctrl-C ends it, never the run")
            yield kept
    elif sys.stdout.isatty() and not console.as_json and os.environ.get("TERM") != "dumb":
        with console.redrawn():
            yield ShowLive(console)
    else:
        yield Show(console)


def show_block(console: Console, view: View) -> None:
    """Print a view as plain lines."""
    from gemma2.cli.terminal.watch_view import view_lines

    console.text("\n".join(line.text for line in view_lines(view, console.width(PIPE_WIDTH))))
    sys.stdout.flush()
