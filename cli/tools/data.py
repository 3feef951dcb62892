"""`gemma2 data`"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand, HelpGroup
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, DryRun, Force, Quiet, file_option
from gemma2.cli.terminal.schema_flags import field_option, split_lists
from gemma2.core.errors import UsageError
from gemma2.core.json_files import JsonMapping
from gemma2.core.outputs.promised import promise
from gemma2.posttrain.schemas.config import resolve
from gemma2.posttrain.schemas.fields import RowFields

if TYPE_CHECKING:
    from gemma2.posttrain.data.chat import ChatFormat
    from gemma2.posttrain.data.own_form import Kind

app = typer.Typer(
    cls=HelpGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP_NAMES,
    help="Inspect data files before training on them, convert them.",
)

ERRORS = 5  # kinds of bad rows that a person is shown

DataPath = typer.Argument(
    metavar="PATH",
    help="File, folder, folder@SPLIT, output, or hub data set.",
    show_default=False,
    rich_help_panel="Inputs",
)
# Flags of `RowFields`, as every command that reads rows has them.
Columns, IgnoreKeys = (field_option(name, RowFields.model_fields[name]) for name in ("columns", "ignore_keys"))
setting = partial(typer.Option, show_default=False, rich_help_panel="Settings")
OutFile = file_option(None, "--out", "-o", help="JSON lines file to write.")


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def inspect(
    path: Path = DataPath,
    model: Path | None = typer.Option(
        None,
        "--model",
        metavar="DIR",
        help="Model whose chat template and tokens are shown; default: Gemma's turns, lengths in characters.",
        show_default=False,
        rich_help_panel="Inputs",
    ),
    read_as: Literal["conversations", "pairs", "prompts"] | None = setting(
        None, "--as", metavar="conversations|pairs|prompts", help="Read the rows as these; default: what they are."
    ),
    rows: int = setting(3, "--rows", min=0, metavar="N", help="Rows to show [default 3]."),
    columns: str | None = Columns,
    ignore_keys: str | None = IgnoreKeys,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Show what is recognised in a data set, as what, how rows will be rendered, their lengths, and what is not read.

    \b
      gemma2 data inspect answers.csv
      gemma2 data inspect chats/ --model google/gemma-2-2b --rows 1
    """  # fmt: skip
    from gemma2.posttrain.data.survey import survey

    options = _options(columns=columns, ignore_keys=ignore_keys, on_bad_row="skip")
    if dry_run:
        _plan(f"data inspect {path}, nothing was rendered", path, options, read_as, as_json)
        return
    found = survey(path, options, _chat_of(model), read_as, rows)
    console = Console(as_json=as_json, quiet=quiet)
    if as_json:
        console.json(found)
    else:
        _show(found, console)
    if not found["rows"]:
        raise typer.Exit(1)


def _show(found: JsonMapping, console: Console) -> None:
    console.result(_overview(found))
    for error in found["errors"][:ERRORS]:
        more = ", ..." if error["rows"] > len(error["first"]) else ""
        console.text(f"\nbad rows ({error['rows']}): {error['error']}\n{', '.join(error['first'])}{more}")
    if (further := len(found["errors"]) - ERRORS) > 0:
        console.text(f"\nand {further} more kinds of bad rows: --json lists them all")
    for row in found["rendered"]:
        silent = ", ".join(str(index + 1) for index in row["not_learned"])
        console.text(f"\n{row['where']}{f' (not learned: message {silent})' if silent else ''}\n{row['text']}")


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def convert(
    path: Path = DataPath,
    to: Literal["conversations", "pairs", "prompts"] | None = setting(
        None,
        "--to",
        metavar="conversations|pairs|prompts",
        help="What to write; default: what the rows are. Conversations become prompts without their last answer.",
    ),
    parse_json: str | None = setting(
        None,
        "--parse-json",
        metavar="A,B,...",
        help="Columns whose texts are JSON (or Python notation) of a list of messages.",
    ),
    columns: str | None = Columns,
    ignore_keys: str | None = IgnoreKeys,
    on_bad_row: Literal["error", "skip"] = setting(
        "error",
        "--on-bad-row",
        metavar="error|skip",
        help="What to do with rows that cannot be read: stop, or leave them out with a count [default error].",
    ),
    out: Path | None = OutFile,
    force: bool = Force,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Write rows of any shape that is read (docs/data.md) as JSON lines in the suite's own form.

    \b
      gemma2 data convert alpaca.json --out rows.jsonl
      gemma2 data convert chats.csv --parse-json messages --out rows.jsonl
    """  # fmt: skip
    from gemma2.posttrain.data.own_form import check_converted, convert_rows

    if out is None:
        raise UsageError("--out is missing", "give the file to write: --out rows.jsonl")
    options = _options(columns=columns, ignore_keys=ignore_keys, on_bad_row=on_bad_row)
    parsed = [name.strip() for name in (parse_json or "").split(",") if name.strip()]
    if dry_run:
        check_converted(path, out, force)
        _plan(f"data convert {path} -> {out}, nothing was written", path, options, to, as_json)
        return
    promise(out, file=True)
    found, reading = convert_rows(path, out, options, to, parsed, force)
    console = Console(as_json=as_json, quiet=quiet)
    console.result(found | reading.report(console, carried=True), out)


def _plan(title: str, path: Path, options: RowFields, kind: Kind | None, as_json: bool) -> None:
    from gemma2.posttrain.data.own_form import plan_reading

    Console(as_json=as_json, quiet=True).result({"plan": title, **plan_reading(path, options, kind)})


def _options(**flags: str | None) -> RowFields:
    return resolve(RowFields, flags=split_lists(RowFields, flags))


def _chat_of(model: Path | None) -> ChatFormat | None:
    if model is None:
        return None
    from gemma2.core.outputs.hub import is_hub_id, locate_model
    from gemma2.posttrain.data.chat import ChatFormat
    from gemma2.posttrain.data.load_tokenizer import load_light_tokenizer

    place = locate_model(model, "--model") if is_hub_id(model) else model
    tokenizer = load_light_tokenizer(place)
    if tokenizer is None:
        from gemma2.posttrain.models.loading import load_tokenizer, quiet_libraries

        quiet_libraries()
        tokenizer = load_tokenizer(place)
    return ChatFormat(tokenizer)


def _overview(found: JsonMapping) -> dict[str, object]:
    """The facts about a data set, a line each."""
    measure = "tokens" if "tokens" in found else "characters"
    return {
        "data": found["path"],
        "files": len(found["files"]),
        "read as": found["kind"],
        "shapes": _counts(found["shapes"]),
        "rows": found["rows"],
        "bad rows": found["bad_rows"] or None,
        "messages": _counts({f"{size} messages": count for size, count in found["messages"].items()}),
        measure: _counts(found.get(measure, {})),
        "of several lines": found["records_of_several_lines"] or None,
        "not read": ", ".join(found["unread_files"]) or None,
        "keys not read": ", ".join(found["unread_keys"]) or None,
        "columns not read": _counts(found["unread_columns"]),
        "note": _counts(found["notes"]),
        "--ignore-keys that no message has": ", ".join(found["ignored_keys_without_use"]) or None,
    }


def _counts(counts: JsonMapping) -> str | None:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or None
