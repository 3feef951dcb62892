"""Writes docs/commands.md from the --help pages, and the methods of docs/merging.md from their table: `make docs`.

A test compares both with what this makes, so that no page is ever behind the code.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from typer.core import TyperGroup

from gemma2.cli.app import COMMANDS, invoke, load
from gemma2.merging.methods.option import OPTIONS
from gemma2.merging.methods.table import METHODS

TARGET = Path(__file__).with_name("commands.md")
MERGING = Path(__file__).with_name("merging.md")
BEGIN, END = "<!-- methods: written by make docs from merging/methods -->", "<!-- end of methods -->"
BASES = {
    "required": "required",
    "sought": "named, or recorded by all models",
    "optional": "named, recorded, or none",
    "given": "optional",
    "none": "not taken",
}
COLUMNS = "100"  # the width of a page, whatever terminal this runs in
HEAD = """\
# Commands

Generated from `--help` by `make docs`. The options under "Output and control" mean the same everywhere.

An error is one line on stderr: what is wrong, where (the flag, the `--set`, or `FILE:LINE:COLUMN`), and the fix. With
`--json` it is a document on stdout too:

```json
{"error": {"kind": "usage", "what": "'steps' = 'many' in r.yaml:3:8 is not a whole number", "where": "r.yaml:3:8",
           "fix": "give a whole number >=1", "exit_code": 2}}
```

| kind | exit code | meaning |
| --- | --- | --- |
| `usage` | 2 | a flag, key or value that the command does not accept |
| `input` | 1 | a file, model or data set that cannot be used |
| `output` | 1 | an output that exists, is locked or does not fit |
| `system` | 1 | the operating system refused: a full disk, missing permission |
| `guard` | 3 | a guard stopped the run: KL limit, NaN, no signal |
| `interrupted` | 128 + signal | SIGINT (130), SIGTERM (143) or SIGHUP (129) |
| `bug` | 1 | anything else; the traceback is on stderr |
"""


def page(command: str) -> str:
    """What `gemma2 COMMAND --help` prints into a pipe."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            invoke([*command.split(), "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def commands() -> Iterator[str]:
    """Every command in the order of the first page, each followed by its sub-commands."""
    for name in COMMANDS:
        yield name
        command = load(name)
        if isinstance(command, TyperGroup):
            yield from (f"{name} {child}" for child in command.commands)


def render() -> str:
    """The whole document."""
    sections = [HEAD, f"```\n{page('')}\n```\n"]
    sections += [f"## gemma2 {name}\n\n```\n{page(name)}\n```\n" for name in commands()]
    return "\n".join(sections)


def methods() -> str:
    """Two tables: merge methods with what they take, and their options."""
    rows = ["| method | base | models | options (default) |", "| --- | --- | --- | --- |"]
    for name, method in METHODS.items():
        least, most = method.models
        count = str(least) if least == most else f"{least} or more"
        taken = [f"`{o.name}`" + (f" ({method.default(o)})" if method.default(o) else "") for o in method.options]
        rows.append(f"| `{name}` | {BASES[method.base]} | {count} | {', '.join(taken) or '-'} |")
    rows += ["", "| option | meaning | values | may differ between |", "| --- | --- | --- | --- |"]
    for option in OPTIONS.values():
        kind = "yes or no" if option.kind == "switch" else option.range or "any number"
        differs = [*(["models"] if option.per == "model" else []), *(["layers, tensors"] if option.varies else [])]
        rows.append(f"| `{option.name}` | {option.help} | {kind} | {', '.join(differs) or '-'} |")
    return "\n".join(rows)


def merging_page() -> str:
    """docs/merging.md with the tables of methods and options between their marks."""
    before, begin, rest = MERGING.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{MERGING} has no marks for its tables")
    return f"{before}{begin}\n\n{methods()}\n\n{end}{after}"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    MERGING.write_text(merging_page(), encoding="utf-8")
