"""`gemma2 merge`: one sub-command per method, files of merges by --config, and `plan`, which writes nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gemma2.cli.terminal.completion import merge_methods
from gemma2.cli.terminal.console import Console
from gemma2.cli.terminal.help import HelpCommand, HelpGroup
from gemma2.cli.terminal.options import HELP_NAMES, AsJson, Out, Quiet, Set, required_out
from gemma2.cli.tools.extract_lora import extract_lora
from gemma2.cli.tools.replace_tokenizer import replace_tokenizer
from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.promised import promise
from gemma2.core.sizes import size
from gemma2.merging.methods.method import Method
from gemma2.merging.methods.request import FILES
from gemma2.merging.methods.table import METHODS
from gemma2.posttrain.schemas.config import is_given

from .merge_methods import CHOICES, ENDING, MODELS, STREAM, THREADS, flags_of, request_of

if TYPE_CHECKING:
    from gemma2.merging import MergePlan, MergeResult
    from gemma2.merging.methods.request import MergeRequest
    from gemma2.merging.recipes.step import Recipe

__all__ = ["app"]

MOST_ROWS = 80  # a longer report is in gemma2.json only
SOMEWHERE = Path("merged")  # of a plan without --out
ConfigFile = typer.Option(
    None,
    "--config",
    metavar="FILE",
    help="Recipe: a YAML file with one merge or several steps, in our keys or in mergekit's.",
    rich_help_panel="Inputs",
)


# --- what is shown ----------------------------------------------------------------------------------------------------


def show_plan(console: Console, plan: MergePlan, named: bool) -> None:
    """Show the plan of a merge. `named`: --out was given."""
    facts = plan.describe()
    if console.as_json:
        console.json(facts)
        return
    shared = _shared(plan)
    shown = {
        "method": plan.request.method,
        "vectors": facts["vectors"],
        "parameters": f"{plan.parameters:,} in {len(plan.layout):,} tensors",
        "coefficients": f"one set for each {plan.request.granularity}: {len(plan.groups)} groups",
        "numbers": ", ".join(f"{name} {_short(value)}" for name, value in shared.items()) or None,
        "passes over the data": facts["passes"],
        "bytes to read": size(facts["bytes_to_read"]),
        "bytes to write": f"{size(facts['bytes_to_write'])}, {size(facts['bytes_free'])} free",
        "outputs": ", ".join(facts["outputs"]) if named else "not named: --out is missing",
        "notes": "; ".join(facts["notes"]) or None,
    }
    console.result(shown)
    for line in facts["warnings"]:
        console.warn(line)
    console.text("")
    console.table([_input_row(plan, number) for number in range(len(plan.inputs))])
    if len(plan.groups) <= MOST_ROWS:
        console.text("")
        console.table([_group_row(plan, number, shared) for number in range(len(plan.groups))])


def _input_row(plan: MergePlan, number: int) -> JsonObject:
    model = plan.inputs[number]
    dtypes = sorted({tensor.dtype for tensor in model.tensors.values()})
    return {"input": model.role, "path": str(model.path), "dtype": " ".join(dtypes), "size": size(model.nbytes)}


def _numbers_of(plan: MergePlan, number: int) -> JsonObject:
    """The options that hold for one group, by the names of the flags."""
    settings = plan.groups[number].settings
    named = {option.name: getattr(settings, option.attribute) for option in METHODS[plan.request.method].options}
    return {name: value for name, value in named.items() if value not in (None, ())}


def _shared(plan: MergePlan) -> JsonObject:
    """The numbers that hold for all groups."""
    first, *others = [_numbers_of(plan, number) for number in range(len(plan.groups))]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _short(value: object) -> str:
    """A number, a flag or one number per model, on a line."""
    if isinstance(value, tuple):
        return " ".join(_short(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _group_row(plan: MergePlan, number: int, shared: Collection[str]) -> JsonObject:
    """A group, and the numbers that are not those of all."""
    from math import prod

    group = plan.groups[number]
    elements = sum(prod(plan.layout[name][1]) for name in group.tensors)
    own = {name: value for name, value in _numbers_of(plan, number).items() if name not in shared}
    return {"group": group.name, "tensors": len(group.tensors), "parameters": elements, **own}


def report(result: MergeResult) -> JsonObject:
    """A merge as a JSON document."""
    return {"outputs": [str(path) for path in result.outputs], "seconds": result.seconds, **result.summary}


def show(console: Console, result: MergeResult) -> None:
    """The report per group, and where the models are."""
    if console.as_json:
        console.json(report(result))
        return
    rows = [
        {
            "group": group.group,
            "parameters": group.parameters,
            "angle": group.angle,
            "norms": group.norms,
            "result norm": group.result_norms,
            "coefficients": group.coefficients[0] if len(group.coefficients) == 1 else None,
            "note": group.fallback or None,
        }
        for group in result.groups
    ]
    used = [name for name in (rows[0] if rows else ()) if any(row[name] is not None for row in rows)]
    if len(rows) <= MOST_ROWS:
        console.table([{name: row[name] for name in used} for row in rows])
    for path in result.outputs:
        console.result({}, path)


# --- carrying out -----------------------------------------------------------------------------------------------------


def run_method(method: str, models: list[Path], given: JsonMapping) -> None:
    """One merge by flags, or its plan."""
    from gemma2.merging.inputs.weight_files import check_folders
    from gemma2.merging.methods.request_check import check_chosen, check_request

    console = Console(as_json=given["as_json"], quiet=given["quiet"])
    request = check_chosen(request_of(method, models, given))
    check_request(request)
    base = {"base": request.base} if request.base else {}
    out = given["out"] if given["dry_run"] else required_out(given["out"])
    check_folders({f"model {number}": path for number, path in enumerate(request.models, start=1)} | base)
    from gemma2.merging import merge, plan_merge

    if given["dry_run"]:
        plan = plan_merge(request, out or SOMEWHERE, given["force"] or out is None)
        show_plan(console, plan, named=out is not None)
        return
    _promise(request, required_out(out))
    result = merge(request, out=out, force=given["force"], verify=given["verify"], progress=console)
    show(console, result)


def _promise(request: MergeRequest, out: Path) -> None:
    """Note the outputs of a merge. What is wrong with the request is said by its plan."""
    from gemma2.merging.plan.merge_plan import output_paths

    with suppress(UsageError):
        for path in output_paths(request, out):
            promise(path)


def run_file(given: JsonMapping) -> None:
    """The merges of a file, or their plans."""
    from gemma2.merging.recipes.recipe import read_recipe

    path = Path(given["config"])
    if (path / "merge.yaml").is_file():  # an output
        path = path / "merge.yaml"
    if not path.is_file():
        raise InputError(f"--config {path} is not a file", "give a YAML file; see docs/merging.md")
    console = Console(as_json=given["as_json"], quiet=given["quiet"])
    chosen = {name: given[name] for name in ("threads", *FILES) if given[name] is not None}
    chosen |= {"stream": True} if given["stream"] else {}
    recipe = read_recipe(path, given["set"] or (), chosen, allow_config=tuple(given["allow_config"] or ()))
    if given["dry_run"]:
        show_recipe(console, recipe, given["out"], given["force"])
        return
    out = required_out(given["out"])
    from gemma2.merging.recipes.run_recipe import merge_recipe

    for step in recipe.steps:
        _promise(step.request, out / step.name if step.name else out)
    results = merge_recipe(recipe, out=out, force=given["force"], verify=given["verify"], progress=console)
    if console.as_json and len(results) > 1:
        names = [step.name for step in recipe.steps]
        console.json({"steps": {name: report(result) for name, result in zip(names, results, strict=True)}})
        return
    for step, result in zip(recipe.steps, results, strict=True):
        if step.name:
            console.heading(step.name)
        show(console, result)


def show_recipe(console: Console, recipe: Recipe, out: Path | None, force: bool) -> None:
    """The plans of all steps; of one whose inputs are still to be made, what is asked for."""
    from gemma2.merging.recipes.run_recipe import plan_recipe

    placed = plan_recipe(recipe, out or SOMEWHERE, force or out is None)
    if console.as_json and len(placed) > 1:
        console.json({"steps": {one.step.name: one.describe() for one in placed}})
        return
    for one in placed:
        for note in one.step.notes:
            console.note(note)
        if one.step.name:
            console.text(f"{one.step.name}:")
        if one.plan is not None:
            show_plan(console, one.plan, named=out is not None)
        else:
            console.result(one.describe())


# --- commands ---------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup)


def merge(ctx: typer.Context, **given: Any) -> None:  # noqa: ANN401
    """Merge models of one architecture: streamed from disk, in fp32 or better, rounded once.

    Every method is a command; a file may hold one merge, or several that take each other's outputs.

    \b
      gemma2 merge --config merge.yaml --out merged
    """
    said = {name for name, value in given.items() if is_given(value) and name != "verify"}
    if ctx.invoked_subcommand is not None:
        if said or not given["verify"]:
            raise UsageError(
                f"options come before '{ctx.invoked_subcommand}'", "give them after the name of the sub-command"
            )
    elif given["config"] is None:
        if said:
            raise UsageError("no method and no --config", "see gemma2 merge --help")
        typer.echo(ctx.get_help())
    else:
        run_file(given)


def plan(ctx: typer.Context, **given: Any) -> None:  # noqa: ANN401
    """Check a merge and print what it would read, compute and write, from headers alone; writes nothing.

    Takes what the merge takes: a method with its arguments, or --config. --out may be left out.

    \b
      gemma2 merge plan slerp rl-1 rl-2 --base sft
      gemma2 merge plan --config merge.yaml
    """
    words = given.pop("words") or []
    if given["config"] is not None and words:
        raise UsageError(f"--config and {words[0]}: a plan is of one of them", "leave one out")
    if given["config"] is not None:
        run_file({**given, "dry_run": True, "force": given["out"] is None, "threads": None})
        return
    if not words:
        raise UsageError("no method and no --config", "see gemma2 merge plan --help")
    commands = ctx.parent.command.commands  # type: ignore[union-attr]
    if words[0] not in METHODS:
        from gemma2.core.yaml_files import closest

        raise UsageError(f"unknown merge method '{words[0]}'", closest(words[0], METHODS))
    arguments = [
        *words[1:],
        *(word for key in given["allow_config"] or () for word in ("--allow-config", key)),
        *(word for name in FILES if given[name] for word in (f"--{name.replace('_', '-')}", given[name])),
        *(["--stream"] if given["stream"] else []),
        "--dry-run",
        *(["--json"] if given["as_json"] else []),
        *(["--quiet"] if given["quiet"] else []),
    ]
    with commands[words[0]].make_context(words[0], arguments, parent=ctx.parent) as inner:
        commands[words[0]].invoke(inner)


def command_of(method: str, entry: Method) -> Callable[..., None]:
    """The function behind one sub-command, with the signature that typer reads."""

    def command(models: list[Path], **given: Any) -> None:  # noqa: ANN401
        run_method(method, models, given)

    models = inspect.Parameter("models", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=MODELS, annotation=list[Path])
    command.__doc__ = f"{entry.help}\n\n\b\n  {entry.example}"
    return _signed(command, [models], flags_of(entry))


def _signed(
    command: Callable[..., None], first: list[inspect.Parameter], options: Mapping[str, tuple[Any, Any]]
) -> Callable[..., None]:
    """A function with one keyword per option in its signature."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    rest = [inspect.Parameter(name, keyword, default=o, annotation=a) for name, (a, o) in options.items()]
    command.__signature__ = inspect.Signature([*first, *rest])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*first, *rest)}
    return command


CONTEXT = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
WORDS = typer.Argument(
    None,
    metavar="METHOD ARGUMENTS",
    help="The merge as it would be called: slerp a b --base init.",
    show_default=False,
    autocompletion=merge_methods,
    rich_help_panel="Inputs",
)
FILE: dict[str, tuple[Any, Any]] = {"config": (str | None, ConfigFile), "set": (list[str] | None, Set)}

app.callback(invoke_without_command=True, context_settings=HELP_NAMES)(
    _signed(merge, [CONTEXT], {**FILE, **CHOICES, "threads": (int | None, THREADS), "stream": (bool, STREAM), **ENDING})
)
for _name, _entry in METHODS.items():
    app.command(name=_name, cls=HelpCommand, context_settings=HELP_NAMES, rich_help_panel=_entry.panel)(
        command_of(_name, _entry)
    )
app.command(
    name="plan",
    cls=HelpCommand,
    context_settings={**HELP_NAMES, "ignore_unknown_options": True, "allow_interspersed_args": False},
    rich_help_panel="Before a merge",
)(
    _signed(
        plan,
        [CONTEXT],
        {
            "words": (list[str] | None, WORDS),
            **FILE,
            **CHOICES,
            "stream": (bool, STREAM),
            "out": (Path | None, Out),
            "as_json": (bool, AsJson),
            "quiet": (bool, Quiet),
        },
    )
)
TOOLS: dict[str, Callable[..., None]] = {"extract-lora": extract_lora, "replace-tokenizer": replace_tokenizer}
for _name, _tool in TOOLS.items():
    app.command(name=_name, cls=HelpCommand, context_settings=HELP_NAMES, rich_help_panel="Tools")(_tool)
