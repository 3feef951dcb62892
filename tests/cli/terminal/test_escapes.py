"""Text of others cannot steer the terminal: one escape at the console's edge, whatever a message holds."""

from __future__ import annotations

import io
import json
import sys

import pytest

from gemma2.cli import main
from gemma2.cli.terminal import console
from gemma2.cli.terminal.console import Console
from gemma2.core.errors import InputError
from gemma2.core.shown import visible

EVIL = "name\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\r\x08\x7f\ud83d[bold red]x[/bold red][/]"
STEERING = set("\x07\x08\r\x7f\x9b\u202e\ud83d")
OURS = "\x1b["  # what rich draws with on a terminal begins so, and never holds what EVIL does


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=[False, True], ids=["pipe", "terminal"])
def streams(request, monkeypatch):
    """stdout and stderr; both as pipes, or both as terminals."""

    def attach():
        kind = Terminal if request.param else io.StringIO
        found = kind(), kind()
        monkeypatch.setattr(sys, "stdout", found[0])
        monkeypatch.setattr(sys, "stderr", found[1])
        monkeypatch.setenv("COLUMNS", "250")
        monkeypatch.setenv("TERM", "xterm-256color")
        return found

    return attach


def bar(to, label=EVIL, **fields):
    with to.task(label, 1, "rows") as task:
        task.advance(1, **fields)


WAYS = {
    "note": lambda to: to.note(EVIL),
    "warn": lambda to: to.warn(EVIL),
    "heading": lambda to: to.heading(EVIL),
    "text": lambda to: to.text(EVIL),
    "result": lambda to: to.result({EVIL: EVIL}),
    "table": lambda to: to.table([{EVIL: EVIL}], EVIL),
    "json": lambda to: to.json({EVIL: EVIL}),
    "json line": lambda to: to.json_line({EVIL: EVIL}),
    "bar": bar,
    "live value": lambda to: bar(to, "rl", **{EVIL: EVIL}),
    "error": lambda to: main._fail(EVIL, 1),
    "error as JSON": lambda to: main._say_as_json(["--json"], "input", 1, EVIL, EVIL, EVIL),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_others_steers_the_terminal(way, streams, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    attached = streams()
    WAYS[way](Console())
    written = "".join(stream.getvalue() for stream in attached)
    assert "[2J" in written and "\x1b[2J" not in written and "\x1b]" not in written
    drawn = way in ("bar", "live value", "table")  # rich draws with returns of its own
    assert not (STEERING - set("\r" if drawn else "")) & set(written)
    assert "[bold red]" in written, "brackets of others are text, not markup"


def test_text_in_other_scripts_stays_as_it_is():
    text = "Größe 価格 ½ n\u202fm\u3000a\u0301 😀\n\ttab"
    assert visible(text) == text


def test_an_error_of_the_command_line_is_escaped(streams, monkeypatch):
    out, err = streams()
    monkeypatch.setattr("gemma2.cli.app.invoke", lambda words: (_ for _ in ()).throw(InputError(EVIL, EVIL)))
    assert main.run(["sft", "--json"]) == 1
    assert "\x1b" not in err.getvalue().replace("\r\x1b[K", "")
    assert "\u202e" in json.loads(out.getvalue())["error"]["what"]
