"""Writes what pages hold of the code: `make docs`. A test compares, so that no page is ever behind.

docs/commands.md      the --help pages
docs/merging.md       the methods, from their table
docs/plan.svg         a plan as a terminal shows it
docs/your-gemma2.md   the memory of each step on a GPU, as gemma2 plan computes it
docs/scale.md         the memory of each training command on one, eight and sixteen GPUs
docs/recipes.md       the recipe of each command, size and machine, with its memory, from the planner
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text
from scale_table import scale
from screens import own_fonts
from typer.core import TyperGroup

from gemma2.cli.app import COMMANDS, invoke, load
from gemma2.merging.methods.option import OPTIONS
from gemma2.merging.methods.table import METHODS
from gemma2.posttrain.planning.estimates import Promise, Sources, estimate
from gemma2.posttrain.planning.memory import Lengths, MemoryPlace, memory_of
from gemma2.posttrain.planning.shapes import SIZES, ModelShape
from gemma2.posttrain.recipe_files.machines import MACHINES, Cell, cells, is_of_one_gpu, least_plan, plan_of
from gemma2.posttrain.schemas import GenerateConfig, MergeConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config

TARGET = Path(__file__).with_name("commands.md")
MERGING = Path(__file__).with_name("merging.md")
BEGIN, END = "<!-- methods: written by make docs from merging/methods -->", "<!-- end of methods -->"
YOURS = Path(__file__).with_name("your-gemma2.md")
MEMORY, END_OF_MEMORY = (
    "<!-- memory: written by make docs from posttrain/planning/memory.py -->",
    "<!-- end of memory -->",
)
QUANTISED, END_OF_QUANTISED = (
    "<!-- few bits: written by make docs from posttrain/planning/memory.py -->",
    "<!-- end of few bits -->",
)
RECIPES = Path(__file__).with_name("recipes.md")
PLANS, END_OF_PLANS = "<!-- recipes: written by make docs from the planner -->", "<!-- end of recipes -->"
SCALE = Path(__file__).with_name("scale.md")
SCALES, END_OF_SCALES = "<!-- scale: written by make docs from the planner -->", "<!-- end of scale -->"
PARAMETERS = 2_614_341_888  # of Gemma 2 2B
CARDS = {"24 GB": 24, "48 GB": 48, "80 GB": 80, "141 GB": 141}
LENGTHS = Lengths(row=1024, prompt=256)  # of the longest rows
BASES = {
    "required": "required",
    "sought": "named, or recorded by all models",
    "optional": "named, recorded, or none",
    "given": "optional",
    "none": "not taken",
}
PICTURE = Path(__file__).with_name("plan.svg")
PLANNED = "plan rlhf --policy 2b --reward 2b --gpu 48GB"
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
| `lost` | 1 | another process of the job, on another machine, is gone |
| `followed` | that of rank 0 | rank 0, on another machine, has ended the job and says why there |
| `output` | 1 | an output that exists, is locked or does not fit |
| `system` | 1 | the operating system refused: a full disk, missing permission |
| `guard` | 3 | a guard stopped the run: KL limit, NaN, no signal |
| `alert` | 4 | an alert of `gemma2 watch` ended the run |
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
    rows = ["| method | in mergekit | base | models | options (default) |", "| --- | --- | --- | --- | --- |"]
    for name, method in METHODS.items():
        least, most = method.models
        count = str(least) if least == most else f"{least} or more"
        taken = [f"`{o.name}`" + (f" ({method.default(o)})" if method.default(o) else "") for o in method.options]
        theirs = ", ".join(f"`{word}`" for word in method.mergekit) or "-"
        rows.append(f"| `{name}` | {theirs} | {BASES[method.base]} | {count} | {', '.join(taken) or '-'} |")
    rows += ["", "| option | in mergekit | meaning | values | may differ between |", "| --- | --- | --- | --- | --- |"]
    forms = [form for method in METHODS.values() for form in method.mergekit.values()]
    words: dict[str, list[str]] = {}
    for word, (attribute, _) in (term for form in forms for term in (*form.per_model.items(), *form.options.items())):
        words.setdefault(attribute, []).append(word)
    for option in OPTIONS.values():
        kind = "yes or no" if option.kind == "switch" else option.range or "any number"
        differs = [*(["models"] if option.per == "model" else []), *(["layers, tensors"] if option.varies else [])]
        theirs = ", ".join(f"`{word}`" for word in dict.fromkeys(words.get(option.attribute, []))) or "-"
        rows.append(f"| `{option.name}` | {theirs} | {option.help} | {kind} | {', '.join(differs) or '-'} |")
    return "\n".join(rows)


def merging_page() -> str:
    """docs/merging.md with the tables of methods and options between their marks."""
    return between(MERGING, BEGIN, END, methods())


def between(page: Path, begin: str, end: str, text: str) -> str:
    """A page with `text` between its marks."""
    before, begins, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ends, after = rest.partition(end)
    if not begins or not ends:
        raise ValueError(f"{page} has no marks for its tables")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def jobs() -> dict[str, Config]:
    """Steps on a 2B, with the options that their memory depends on."""
    model, rows = Path("model"), Path("rows")
    one = {"micro_batch_size": 1}
    rl = {"policy": model, "prompts": rows, "reward": (model,), **one}
    return {
        "`generate`, `reward score`": GenerateConfig(teacher=model, prompts=rows),
        "`sft --lora-rank 16`": SftConfig(model=model, data=(rows,), **one, lora_rank=16),
        "`sft`, all weights": SftConfig(model=model, data=(rows,), **one),
        "`reward --lora-rank 16`": RewardConfig(model=model, data=rows, **one, lora_rank=16),
        "`reward`, all weights": RewardConfig(model=model, data=rows, **one),
        "`rlhf --lora-rank 16 --lora-anchor factors`": RlhfConfig(**rl, lora_rank=16, lora_anchor="factors"),
        "`rlhf --lora-rank 16`": RlhfConfig(**rl, lora_rank=16),
        "`rlhf`, all weights": RlhfConfig(**rl),
        "`merge slerp`": MergeConfig(method="slerp", models=(model, model), base=model),
    }


def memory() -> str:
    """A table: memory and disk of each step on a 2B, and the cards that are large enough."""
    promised = {
        Path("model"): Promise("policy", PARAMETERS, shape=("gemma2", 2304, 26)),
        Path("rows"): Promise("data", rows=10_000, size=10_000 * 2_000),
    }
    head = ["step", "memory, GB", "disk, GB", *CARDS]
    rows = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for name, config in jobs().items():
        work = estimate(config, Sources(promised))
        assert work is not None, name
        plan = memory_of(config, size_of, MemoryPlace("accelerator"), LENGTHS)
        needed = (plan.peak.bytes if plan else work.memory or 0.0) / 1e9
        fits = ["yes" if needed <= size else "no" for size in CARDS.values()]
        if isinstance(config, MergeConfig):
            fits = ["no GPU"] * len(CARDS)
        rows.append(f"| {name} | {needed:.1f} | {work.disk / 1e9:.3g} | {' | '.join(fits)} |")
    return "\n".join(rows)


def size_of(path: Path) -> ModelShape:
    """The shape of every model of `jobs`."""
    return SIZES["2b"]


def quantised() -> str:
    """A table: memory of trainings of adapters on a base in bf16, 8 and 4 bits."""
    rows = ["| | bf16 | 8 bits | 4 bits |", "| --- | --- | --- | --- |"]
    adapter: dict[str, object] = {"lora_rank": 16, "micro_batch_size": 1, "max_length": 2048}
    rl: dict[str, object] = {
        "lora_rank": 16,
        "lora_anchor": "factors",
        "prompts": "rows",
        "n": 4,
        "micro_batch_size": 4,
    }
    for size in ("2b", "9b"):
        kinds: dict[str, tuple[type[SftConfig | RewardConfig | RlhfConfig], dict[str, object]]] = {
            "sft": (SftConfig, {"model": size, "data": "rows", **adapter}),
            "reward": (RewardConfig, {"model": size, "data": "rows", **adapter}),
            "rlhf, reward model 2B": (RlhfConfig, {"policy": size, "reward": ["2b reward model"], **rl}),
            "rlhf, reward function": (RlhfConfig, {"policy": size, "reward_fn": ["rewards:score"], **rl}),
        }
        for name, (schema, settings) in kinds.items():
            cells_of_row = []
            for bits in (None, 8, 4):
                config = schema.model_validate({**settings, "base_bits": bits})
                plan = memory_of(config, named_size, MemoryPlace("accelerator"))
                assert plan is not None, name
                cells_of_row.append(f"{plan.peak.bytes / 1e9:.1f}")
            command, _, more = name.partition(",")
            rows.append(f"| {command} {size.upper()}{',' if more else ''}{more} | {' | '.join(cells_of_row)} |")
    return "\n".join(rows)


def named_size(path: Path) -> ModelShape:
    """The shape of a model that is named by its size, and of a reward model of that size."""
    size, _, kind = str(path).partition(" ")
    return replace(SIZES[size], outputs=1 if kind else 0)


def your_page() -> str:
    """docs/your-gemma2.md with its tables of memory between the marks."""
    text = between(YOURS, MEMORY, END_OF_MEMORY, memory())
    begin, end = text.index(QUANTISED) + len(QUANTISED), text.index(END_OF_QUANTISED)
    return f"{text[:begin]}\n\n{quantised()}\n\n{text[end:]}"


def plans() -> str:
    """A table: the recipe of every command and size on each machine with its memory, or the memory that it lacks."""
    head = ["command, model", *MACHINES]
    rows = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for command, size in dict.fromkeys((cell.command, cell.size) for cell in cells()):
        row = [f"{command}, {size.upper()}"]
        for machine in MACHINES:
            cell = Cell(command, size, machine)
            if cell.path is not None:
                row.append(f"{plan_of(cell).needed / 1e9:.0f} GB")
            elif is_of_one_gpu(cell):
                row.append("one GPU: as 80gb")
            else:
                row.append(f"no: {least_plan(cell).needed / 1e9:.0f} GB")
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def recipes_page() -> str:
    """docs/recipes.md with its table between the marks."""
    return between(RECIPES, PLANS, END_OF_PLANS, plans())


def scale_page() -> str:
    """docs/scale.md with its table between the marks."""
    return between(SCALE, SCALES, END_OF_SCALES, scale())


class Terminal(io.StringIO):
    """A terminal that keeps what is printed."""

    def isatty(self) -> bool:
        return True


def picture() -> str:
    """docs/plan.svg: a plan that is the same on every machine."""
    before = dict(os.environ)
    os.environ |= {"COLUMNS": COLUMNS, "TERM": "xterm-256color"}
    os.environ.pop("NO_COLOR", None)
    out = Terminal()
    try:
        with contextlib.redirect_stdout(out):
            invoke(PLANNED.split())
    finally:
        os.environ.clear()
        os.environ |= before
    console = Console(record=True, file=io.StringIO(), width=int(COLUMNS))
    console.print(Text.from_ansi(f"$ gemma2 {PLANNED}\n\n{out.getvalue()}"))
    return console.export_svg(title="gemma2 plan", unique_id="plan", code_format=own_fonts())


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    TARGET.write_text(render(), encoding="utf-8")
    MERGING.write_text(merging_page(), encoding="utf-8")
    YOURS.write_text(your_page(), encoding="utf-8")
    RECIPES.write_text(recipes_page(), encoding="utf-8")
    SCALE.write_text(scale_page(), encoding="utf-8")
