"""Commands from schemas, and the flags that all commands share, declared once.

Precedence: recipe (`--config`) < `--set a.b=c` < flags. A flag that is not given is None and keeps the recipe's value.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

import typer
from pydantic.fields import FieldInfo

from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.core.outputs.manifest import STATE
from gemma2.core.outputs.promised import promise
from gemma2.core.outputs.staging import check_named, check_output, partial_path
from gemma2.core.permissions import allow
from gemma2.core.progress import SILENT
from gemma2.core.ranks import is_main
from gemma2.posttrain.recipe_files.named_recipe import recipe_path
from gemma2.posttrain.runs.run_options import RunOptions
from gemma2.posttrain.runs.servers import allow_given, names_servers
from gemma2.posttrain.schemas.config import Config, ValueSource, is_given, load_yaml, resolve

from .completion import recipes_of_command
from .console import Console
from .help import HelpCommand, HelpGroup
from .schema_flags import Flags, TypeForm, flag_type, flags_of, split_lists
from .several import check_machines, one_error, several

if TYPE_CHECKING:
    from gemma2.posttrain.runs.commands import Runner

    from .plan_view import PlanAsked

__all__ = [
    "COMMON",
    "QUESTION",
    "AllowHost",
    "AllowKey",
    "AllowVersions",
    "AsJson",
    "DryRun",
    "Force",
    "Form",
    "Out",
    "Quiet",
    "Resume",
    "add_stage",
    "file_option",
    "required_out",
    "stage",
    "stage_group",
]

COMMON = "Output and control"
QUESTION = "gemma2.plan"  # key of what `gemma2 plan` asks, in the meta of a context
ARGUMENT = "argument"  # parameter name of a field that may be given without its flag
HELP_NAMES = {"help_option_names": ["-h", "--help"]}

# --- flags that mean the same everywhere ------------------------------------------------------------------------------

Out = typer.Option(
    None,
    "--out",
    "-o",
    metavar="DIR",
    help="Output directory; the output of each command appears when it is complete.",
    rich_help_panel=COMMON,
)
Resume = typer.Option(False, "--resume", help="Continue an interrupted run of this output.", rich_help_panel=COMMON)
Force = typer.Option(
    False, "--force", help="Replace an existing output, in one rename at the end.", rich_help_panel=COMMON
)
DryRun = typer.Option(
    False, "--dry-run", help="Check everything, print the plan, write nothing.", rich_help_panel=COMMON
)
AsJson = typer.Option(False, "--json", help="One JSON document on stdout, also for an error.", rich_help_panel=COMMON)
Quiet = typer.Option(False, "--quiet", "-q", help="No progress on stderr.", rich_help_panel=COMMON)
ConfigFile = typer.Option(
    None,
    "--config",
    metavar="FILE",
    help="Recipe: a YAML file, an output to repeat, or the name of one that comes with gemma2.",
    rich_help_panel=COMMON,
    autocompletion=recipes_of_command,
)
Set = typer.Option(
    None,
    "--set",
    metavar="KEY=VALUE",
    help="Set any key of the configuration, also nested ones; repeatable.",
    rich_help_panel=COMMON,
)

AllowHost = typer.Option(
    None,
    "--allow-host",
    metavar="HOST",
    help="Allow a server that a file names to be sent data: HOST or HOST:PORT; repeatable.",
    rich_help_panel=COMMON,
)
AllowKey = typer.Option(
    None,
    "--allow-key",
    metavar="NAME",
    help="Allow an environment variable that a file names to be sent to its server as the key; repeatable.",
    rich_help_panel=COMMON,
)

AllowVersions = typer.Option(
    False,
    "--allow-versions",
    help="Continue an interrupted run though packages that compute, or the code of your functions, have changed.",
    rich_help_panel=COMMON,
)

Form = typer.Option(
    "text",
    "--format",
    metavar="text|mermaid|svg",
    help="Format of the drawing [default text].",
    show_default=False,
    rich_help_panel="Settings",
)


# A flag that names one file to write, called as typer.Option: its default, its names, its help.
file_option = partial(typer.Option, metavar="FILE", show_default=False, rich_help_panel=COMMON)


def required_out(out: Path | None) -> Path:
    """The value of --out. Raises UsageError if it was not given, OutputError if it has no name, as `.` and `/`."""
    if out is None:
        raise UsageError("--out is missing", "give the directory to write")
    return check_named(out)


NAMED = re.compile(r"--([a-z][a-z-]*)|'([a-z_]+(?:\.\w+)+)'")  # a flag, or a nested key, in a message


@contextmanager
def placed(file: Path | None, sets: Sequence[str], flags: Flags) -> Iterator[None]:
    """Add the line of the recipe, or the --set, to an error about a value that no flag gave."""
    try:
        yield
    except (UsageError, InputError) as error:
        found = NAMED.search(error.what)
        keys = found[1].replace("-", "_").split(".") if found and found[1] else found[2].split(".") if found else []
        if error.where or not keys or flags.get(keys[0]) is not None:
            raise
        where = ValueSource(file, tuple(sets)).place(keys)
        if not where.startswith("--set ") and (file is None or keys[0] not in load_yaml(file)):
            raise
        raise type(error)(f"{error.what} in {where}", error.hint, where) from error


# --- commands of a schema ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """A flag `--NAME N` that shows the first N items of the input and stops; needs no --out, writes nothing."""

    name: str
    help: str
    show: Callable[[Any, int, Console], None]

    def parameter(self) -> inspect.Parameter:
        """The flag as a parameter of the command's function."""
        flag = f"--{self.name.replace('_', '-')}"
        option = typer.Option(None, flag, metavar="N", min=1, help=self.help, rich_help_panel=COMMON)
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=int | None)


def stage(
    schema: type[Config],
    run: Runner,
    *,
    examples: str,
    writes: bool = True,
    positional: str | None = None,
    look: Look | None = None,
    prints: bool = False,
) -> typer.Typer:
    """A command of one schema: flags, recipe and --set -> configuration -> `run` -> result.

    With `writes` the command takes --out, --resume and --force; if it `prints` too, it runs without --out, and writes
    nothing then. `positional` names a field that may be given as an argument too.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command = make_command(schema, run, writes, positional, look, prints)
    _describe(command, schema, examples)
    app.command(cls=HelpCommand, context_settings=HELP_NAMES)(command)
    return app


def stage_group(schema: type[Config], run: Runner, *, examples: str) -> typer.Typer:
    """A command that also has sub-commands; called without one, it runs itself."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=HelpGroup)
    command = make_command(schema, run, writes=True)
    _describe(command, schema, examples)
    app.callback(invoke_without_command=True, context_settings=HELP_NAMES)(command)
    return app


def add_stage(
    app: typer.Typer,
    schema: type[Config],
    run: Runner,
    *,
    name: str | None = None,
    examples: str,
    writes: bool = True,
    positional: str | None = None,
) -> None:
    """Register a command of one schema on an application; `writes` and `positional` as for `stage`."""
    command = make_command(schema, run, writes, positional)
    _describe(command, schema, examples)
    app.command(name=name, cls=HelpCommand, context_settings=HELP_NAMES)(command)


def _describe(command: Callable[..., None], schema: type[Config], examples: str) -> None:
    lines = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
    command.__doc__ = f"{inspect.getdoc(schema)}\n\n\b\n{lines}"


def _argument(name: str, field: FieldInfo) -> inspect.Parameter:
    """The parameter that takes a field as an argument, in addition to its flag; for a list, several arguments."""
    several = get_origin(field.annotation) is tuple
    metavar = (name.removesuffix("s") if several else name).upper()
    described = typer.Argument(None, metavar=metavar, help=f"{field.description} (or --{name}).", show_default=False)
    annotation = list[str] | None if several else flag_type(field) | None
    return inspect.Parameter(ARGUMENT, inspect.Parameter.KEYWORD_ONLY, default=described, annotation=annotation)


def _with_argument(name: str, value: object, flags: Flags) -> Flags:
    if flags[name] is not None:
        raise UsageError(f"'{value}' and --{name} {flags[name]} name two inputs", f"give one {name.upper()}")
    return flags | {name: tuple(value) if isinstance(value, list) else value}


def make_command(
    schema: type[Config],
    run: Runner,
    writes: bool,
    positional: str | None = None,
    look: Look | None = None,
    prints: bool = False,
) -> Callable[..., None]:
    """The function that typer calls for a command, with one keyword per flag in its signature."""
    flags = flags_of(schema)
    with_servers = names_servers(schema)
    arguments = [_argument(positional, schema.model_fields[positional])] if positional else []

    def command(ctx: typer.Context, **values: object) -> None:
        given: Flags = values
        if ctx.invoked_subcommand is not None:
            if ctx.args or any(map(is_given, given.values())):
                raise UsageError(
                    f"options come before '{ctx.invoked_subcommand}'", "give them after the name of the sub-command"
                )
        else:
            console = Console(as_json=given["as_json"], quiet=given["quiet"] or not is_main())
            settings = split_lists(schema, {name: given[name] for name in flags})
            asked: PlanAsked | None = ctx.meta.get(QUESTION)
            if positional and given.get(ARGUMENT):
                settings = _with_argument(positional, given[ARGUMENT], settings)
            file = recipe_path(given["config"], ctx.command_path.partition(" ")[2])
            if asked is not None:
                settings = asked.complete(schema, settings, file, given["set"] or ())
            config = resolve(schema, file=file, sets=given["set"] or (), flags=settings)
            from gemma2.posttrain.runs.inputs import check_inputs, located

            if with_servers:
                allow(given["allow_host"] or (), given["allow_key"] or ())
                allow_given(config, settings, given["set"] or ())
            with placed(file, given["set"] or (), settings):
                if given["dry_run"]:
                    allow(versions=writes and given["allow_versions"])
                    from .plan_view import plan_only

                    needs_out = writes and asked is None and not (prints and _is_for_the_screen(given))
                    out = required_out(given["out"]) if needs_out else given.get("out")
                    options = None if out is None else RunOptions(out, given["resume"], given["force"])
                    plan_only(config, options, console, asked)
                    return
                config = several(located(config), ctx.obj, console)
                if look is not None and given[look.name] is not None:
                    check_inputs(config)
                    look.show(config, given[look.name], console)
                    return
                to_write = writes and not (prints and _is_for_the_screen(given))
                with one_error(config):
                    if to_write:
                        execute(config, given, run, console)
                    else:
                        show_result(config, run, console)

    common: dict[str, tuple[TypeForm, object]] = {"config": (str | None, ConfigFile), "set": (list[str] | None, Set)}
    if writes:
        common |= {
            "out": (Path | None, Out),
            "resume": (bool, Resume),
            "allow_versions": (bool, AllowVersions),
            "force": (bool, Force),
        }
    if with_servers:
        common |= {"allow_host": (list[str] | None, AllowHost), "allow_key": (list[str] | None, AllowKey)}
    common |= {"dry_run": (bool, DryRun), "as_json": (bool, AsJson), "quiet": (bool, Quiet)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *arguments,
        *flags.values(),
        *([look.parameter()] if look else []),
        *(inspect.Parameter(key, keyword, default=o, annotation=a) for key, (a, o) in common.items()),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _is_for_the_screen(given: Flags) -> bool:
    """Whether a command that prints has no --out. Raises UsageError for flags that then mean nothing."""
    if given["out"] is not None:
        return False
    if name := next((name for name in ("resume", "force") if given[name]), None):
        raise UsageError(f"--{name} is given without --out", f"give --out, or drop --{name}")
    return True


def show_result(config: Config, run: Runner, console: Console) -> None:
    """Run a command that writes nothing; of several processes rank 0 prints."""
    from gemma2.posttrain.checks.of_command import CommandChecks

    CommandChecks(isolated=False).of(config)
    result = run(config, RunOptions(Path()), console if is_main() else SILENT)
    if is_main():
        console.result(result.summary)


def execute(config: Config, given: Flags, run: Runner, console: Console) -> None:
    """Run a command that writes an output."""
    options = RunOptions(required_out(given["out"]), given["resume"], given["force"])
    allow(versions=given["allow_versions"])
    from gemma2.posttrain.checks.of_command import CommandChecks
    from gemma2.posttrain.checks.plan import shortages
    from gemma2.posttrain.runs.finished import publish_finished
    from gemma2.posttrain.runs.run_directory import resumed_with
    from gemma2.posttrain.runs.way_on import names_the_way

    check_machines(config, options.out)
    promise(options.out)
    checks = CommandChecks(isolated=False)
    models = checks.inputs(config)
    finished = publish_finished(config, options)
    if finished is not None:
        if is_main():
            console.note("the run was complete when it was killed: nothing is computed again")
            console.result(finished.summary, finished.out)
        return
    if options.resume:
        if (line := resumed_with(config, options.out)) and is_main():
            console.note(line)
    else:
        check_output(options.out, options.force)
    rows = checks.contents(config, models)
    if is_main():
        for problem in shortages(config, checks.sources, rows, options.out):
            console.warn(problem)  # an estimate: the run may need less
    try:
        result = run(config, options, console if is_main() else SILENT)
    except BaseException as error:
        said = isinstance(error, Gemma2Error) and names_the_way(error.hint)
        if not said and (partial_path(options.out) / STATE).is_file():
            console.note("work done so far is kept: continue with --resume")
        raise
    if is_main():
        console.result(result.summary, result.out)
