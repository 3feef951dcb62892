"""`gemma2 chat`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand
from gemma2.cli.terminal.options import HELP_NAMES, QUESTION, AsJson, DryRun, Quiet

if TYPE_CHECKING:
    from gemma2.posttrain.chat.speaker import Speaker
    from gemma2.posttrain.chat.talk import Talk

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


Model = typer.Argument(
    metavar="MODEL", help="A model directory or hub id.", show_default=False, rich_help_panel="Inputs"
)
Against = typer.Option(
    None,
    "--against",
    metavar="OTHER",
    help="A second model that answers the same, with the same seed.",
    show_default=False,
    rich_help_panel="Inputs",
)
Prompt = typer.Option(
    None,
    "-p",
    "--prompt",
    metavar="TEXT",
    help="Answer this once, then end.",
    show_default=False,
    rich_help_panel="Inputs",
)
System = typer.Option(
    "", "--system", metavar="TEXT", help="A system text.", show_default=False, rich_help_panel="Inputs"
)
Temperature = typer.Option(
    None,
    "--temperature",
    metavar="FLOAT",
    help="Sampling temperature [default 1; 0 is greedy].",
    show_default=False,
    rich_help_panel="Settings",
    min=0,
    max=5,
)
TopP = typer.Option(
    None,
    "--top-p",
    metavar="FLOAT",
    help="Sample from the most probable tokens with this mass [default 1].",
    show_default=False,
    rich_help_panel="Settings",
    min=0.000001,
    max=1,
)
MaxNewTokens = typer.Option(
    None,
    "--max-new-tokens",
    metavar="INT",
    help="Limit of an answer, tokens [default 512].",
    show_default=False,
    rich_help_panel="Settings",
    min=1,
)
Seed = typer.Option(
    None,
    "--seed",
    metavar="INT",
    help="Seed of the first answer [default 0]; one more after each.",
    show_default=False,
    rich_help_panel="Settings",
    min=0,
)
Dtype = typer.Option(
    None,
    "--dtype",
    metavar="float32|bfloat16",
    help="Precision [default bfloat16 on an accelerator, else float32].",
    show_default=False,
    rich_help_panel="Settings",
)
Attention = typer.Option(
    "auto",
    "--attention",
    metavar="auto|eager|sdpa",
    help="Attention kernel; auto: eager. An answer is drawn with masks that the others do not take.",
    rich_help_panel="Settings",
)
Votes = typer.Option(
    Path("votes.jsonl"),
    "--votes",
    metavar="FILE",
    help="File that /vote appends preferences to.",
    rich_help_panel="Settings",
)


@app.command(cls=HelpCommand, context_settings=HELP_NAMES)
def chat(
    ctx: typer.Context,
    model: Path = Model,
    against: Path | None = Against,
    prompt: str | None = Prompt,
    system: str = System,
    temperature: float | None = Temperature,
    top_p: float | None = TopP,
    max_new_tokens: int | None = MaxNewTokens,
    seed: int | None = Seed,
    dtype: str | None = Dtype,
    attention: str = Attention,
    votes: Path = Votes,
    dry_run: bool = DryRun,
    as_json: bool = AsJson,
    quiet: bool = Quiet,
) -> None:
    """Talk to a model, or to two side by side.

    Answers appear while they are drawn; Ctrl-C ends an answer, Ctrl-D the chat; /help lists the commands. With -p, or
    with a text on stdin, it answers once and ends: the answer is on stdout, nothing else.

    \b
      gemma2 chat merged
      gemma2 chat merged --against sft
      echo "What is 2 plus 3?" | gemma2 chat merged --temperature 0
    """  # fmt: skip
    from gemma2.core.errors import UsageError
    from gemma2.posttrain.chat.talk import DrawSettings, Talk

    if dtype not in (None, "float32", "bfloat16"):
        raise UsageError(f"--dtype {dtype} is unknown", "use float32 or bfloat16")
    if attention not in ("auto", "eager", "sdpa"):
        raise UsageError(f"--attention {attention} does not draw answers", "use auto, eager or sdpa")
    given = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed}
    settings = DrawSettings().changed(" ".join(f"{key}={value}" for key, value in given.items() if value is not None))
    models = [model] if against is None else [model, against]
    if dry_run:
        _show_plan(models, dtype, QUESTION in ctx.meta, Console(as_json=as_json, quiet=quiet))
        return
    once = prompt if prompt is not None else None if sys.stdin.isatty() else sys.stdin.read()
    if once is not None and not once.strip():
        raise UsageError("there is no question", "give -p TEXT, or a text on stdin")
    if as_json and once is None:
        raise UsageError("--json answers once", "give -p TEXT, or a text on stdin")
    console = Console(as_json=as_json, quiet=quiet)
    speakers = _loaded(models, dtype, attention, console)
    talk = Talk([one.name for one in speakers], system, settings=settings, votes=votes)
    _converse(speakers, talk, once, console)


def _show_plan(paths: list[Path], dtype: str | None, sizes: bool, console: Console) -> None:
    """The models that would be loaded, from their headers, and the memory of a conversation that fills the context."""
    from gemma2.posttrain.checks.plan import place_of
    from gemma2.posttrain.planning.answering import of_chat
    from gemma2.posttrain.planning.named_models import named_shape
    from gemma2.posttrain.planning.parts import settled
    from gemma2.posttrain.runs.machine import free_memory

    found = [named_shape(path, "model", sizes) for path in paths]
    _check_policies([place for place, _, note in found if not note])
    shapes = [shape for _, shape, _ in found]
    memory = free_memory()
    context = min(shape.context for shape in shapes)
    peak = settled(of_chat(shapes, context, place_of(memory)), place_of(memory)).peak
    models = {
        f"model {number}": f"{place} ({shape.parameters:,.0f} parameters{f': {note}' if note else ''})"
        for number, (place, shape, note) in enumerate(found, 1)
    }
    needs = {
        "context": context,
        "memory_gib": round(peak.bytes / 2**30, 3),
        "memory_free_gib": round(memory.free / 2**30, 1),
        "memory_of": memory.where,
    }
    console.result({"plan": "chat, nothing was loaded", **models, "dtype": dtype, **needs})


def _loaded(paths: list[Path], dtype: str | None, attention: str, console: Console) -> list[Speaker]:
    """The models, checked by their headers before torch is imported."""
    from gemma2.core.outputs.hub import locate_model
    from gemma2.posttrain.runs.inputs import model_name

    places = [locate_model(path, "model") for path in paths]
    _check_policies(places)
    import torch

    from gemma2.posttrain.chat.speaker import Speaker
    from gemma2.posttrain.models.loading import quiet_libraries

    quiet_libraries()
    kind = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    names = [model_name(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths] if paths[0] != paths[1] else [f"{names[0]} ({side})" for side in "ab"]
    found = []
    for place, name in zip(places, names, strict=True):
        if sys.stderr.isatty():
            console.note(f"loading {name}")
        found.append(Speaker.load(place, name, kind, "sdpa" if attention == "sdpa" else "eager"))
    return found


def _check_policies(places: list[Path]) -> None:
    from gemma2.core.errors import InputError
    from gemma2.merging.inputs.weight_files import check_folders
    from gemma2.posttrain.checks.kinds import NAMES, POLICY, look_at

    check_folders({f"model {number}" if number else "model": place for number, place in enumerate(places)})
    for place in places:
        found = look_at(place)
        if found is not None and found.kind != POLICY:
            raise InputError(f"{place} is {NAMES.get(found.kind, found.kind)}", "give a policy")


def _converse(speakers: list[Speaker], talk: Talk, once: str | None, console: Console) -> None:
    from gemma2.cli.chat.input_lines import InputLines
    from gemma2.cli.chat.loop import Chat
    from gemma2.cli.chat.screen import Screen

    if once is None:
        Chat(speakers, talk, Screen()).run(InputLines())
        return
    screen = Screen(silent=console.as_json)
    answers = Chat(speakers, talk, screen).ask(once.strip())
    if console.as_json:
        rows = [
            {"model": name, "answer": one.text, "end": one.end} for name, one in zip(talk.models, answers, strict=True)
        ]
        console.json({"prompt": once.strip(), "system": talk.system or None, "answers": rows})
