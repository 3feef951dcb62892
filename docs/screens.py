"""Pictures of the terminal for the pages: `make screens`, from the models of `make quickstart`. Needs tmux.

Each scene is typed into a real terminal, and what stands on its screen then becomes an SVG in docs/screens/. Nothing in
a picture is written by hand; the commands are those that the pages name.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

TARGET = Path(__file__).with_name("screens")
PROMPT = "$ "
LONGEST = 180.0  # seconds that a command may take
PAUSE = 0.2
RULES = "def reward(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"


@dataclass(frozen=True)
class Scene:
    """What is typed, line by line, on a screen of this width. `until`: what a line's answer ends with, if no prompt."""

    name: str
    lines: tuple[str, ...]
    width: int = 110
    until: str = PROMPT


SCENES = (
    Scene("doctor", ("gemma2 doctor warp/model",)),
    Scene("eval", ("gemma2 eval warp/model --qa questions.jsonl --against models/student --quiet",)),
    Scene(
        "chat",
        ("gemma2 chat warp/model --against sft --seed 0", "What is 2 plus 3?", "/vote a", "/quit"),
        until=">>> ",
    ),
)


class Terminal:
    """A shell in tmux, in a folder, that finds `gemma2`."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.socket = f"gemma2-screens-{os.getpid()}"
        environment = {
            **os.environ,
            "PATH": f"{folder.parent}{os.pathsep}{os.environ['PATH']}",
            "PS1": PROMPT,
            "PYTHONPATH": str(folder),
            "HF_HUB_OFFLINE": "1",
        }
        shell = ["env", f"PS1={PROMPT}", "bash", "--norc", "--noprofile", "-i"]
        size = ["-x", str(width), "-y", "80"]
        self._tmux("new-session", "-d", *size, "-c", str(folder), *shell, environment=environment)
        self._rest(PROMPT)

    def _tmux(self, *words: str, environment: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            ["tmux", "-L", self.socket, *words], check=True, capture_output=True, text=True, env=environment
        )
        return done.stdout

    def type(self, line: str, until: str) -> None:
        """Type a line, and wait until the screen ends with `until` and rests."""
        self._tmux("send-keys", "-l", line)
        self._tmux("send-keys", "Enter")
        self._rest(until)

    def _rest(self, until: str) -> None:
        ends, before = time.monotonic() + LONGEST, ""
        while time.monotonic() < ends:
            time.sleep(PAUSE)
            shown = self._tmux("capture-pane", "-p").rstrip("\n")
            last = shown.splitlines()[-1] if shown else ""
            if shown == before and last.strip() in (until.strip(), PROMPT.strip()):
                return
            before = shown
        raise TimeoutError(f"the screen did not come to rest:\n{before}")

    def screen(self) -> str:
        """What stands on the screen, with its colours, without the last prompt."""
        return self._tmux("capture-pane", "-e", "-p").rstrip("\n").removesuffix(PROMPT.strip()).rstrip("\n")

    def close(self) -> None:
        """End the shell."""
        subprocess.run(["tmux", "-L", self.socket, "kill-server"], check=False, capture_output=True)


def picture(screen: str, title: str, width: int) -> str:
    """The screen as an SVG that loads nothing from elsewhere."""
    console = Console(record=True, width=width, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(screen), soft_wrap=True)
    return console.export_svg(title=title, theme=MONOKAI, code_format=own_fonts())


def own_fonts() -> str:
    """The template of rich's pictures without its web fonts, which a viewer would fetch."""
    text = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return text.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quickstart", type=Path, help="output of gemma2 quickstart")
    parser.add_argument("scenes", nargs="*", default=[scene.name for scene in SCENES], help="names; default: all")
    options = parser.parse_args()
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "work"
        command = Path(place) / "gemma2"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gemma2.cli.main "$@"\n')
        command.chmod(0o755)
        shutil.copytree(options.quickstart, folder)
        (folder / "rules.py").write_text(
            "def reward(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
        )
        rows = (folder / "models" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:200]
        questions = [row.replace('"prompt":', '"question":', 1) for row in rows]
        (folder / "questions.jsonl").write_text("\n".join(questions), encoding="utf-8")
        for scene in SCENES:
            if scene.name not in options.scenes:
                continue
            terminal = Terminal(folder, scene.width)
            try:
                for line in scene.lines:
                    terminal.type(line, scene.until)
                screen = terminal.screen()
            finally:
                terminal.close()
            svg = picture(screen, scene.lines[0], scene.width)
            (TARGET / f"{scene.name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
