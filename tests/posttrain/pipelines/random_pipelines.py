"""Random pipelines, random changes and random interruptions, from a seed; and a command whose output shows all of them.

The command `mix` writes what it read: settings, the weights and the configuration of its models, its rows, the value of
a function of the user's. So an output that was skipped although something differs has other bytes than a fresh one. It
stops half-way where a file says so, and goes on with what it had read before: a run that is continued although its
inputs changed has other bytes, too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import invalidate_caches
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from pydantic import Field
from stages import Inline, Stub, compiled
from text_model import text_of, write_text_model

from gemma2.core.errors import InputError
from gemma2.core.outputs.staging import partial_path
from gemma2.core.permissions import ALLOWED_VERSIONS
from gemma2.posttrain.checks.of_command import CommandChecks
from gemma2.posttrain.data.sources import data_files
from gemma2.posttrain.pipelines.check import Checked, check_pipeline, look_at_pipeline
from gemma2.posttrain.pipelines.compile import Pipeline
from gemma2.posttrain.pipelines.decision import GOES_ON_IF, Choice
from gemma2.posttrain.pipelines.run import Watcher, run_stages
from gemma2.posttrain.pipelines.scheduler import StageFailed
from gemma2.posttrain.provenance import version_rule
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.run_directory import RunOptions, RunResult, open_run
from gemma2.posttrain.schemas.config import Config

ALL = Choice()
BREAKS = "breaks"  # folder next to a pipeline: a file for each stage that is to stop half-way


class Mixing(Config):
    INCIDENTAL = frozenset({"pace"})
    pace: int = 1
    model: Path | None = None
    models: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    reward_fn: tuple[str, ...] = ()
    chat_template: str | None = None
    value: float = 0.0
    text: str = Field("", description="any text")


def mix(config: Mixing, options: RunOptions, progress: Any) -> RunResult:
    """A model, and rows, that show all that they were made from."""
    with open_run("mix", config, options) as run:
        half = run.checkpoints / "half"
        if run.resumed:
            content = half.read_text()
        else:
            models = [*([config.model] if config.model else []), *config.models]
            parts = [f"({text_of(path)}|{(path / 'config.json').read_text()})" for path in models]
            parts += [file.read_text() for path in config.data for file in data_files(path)]
            parts += [Path(config.chat_template).read_text()] if config.chat_template else []
            parts += [str(called(name)) for name in config.reward_fn]
            content = f"{config.value}{config.text}{parts}"
            half.parent.mkdir()
            half.write_text(content)
        note = options.out.parent / f"{BREAKS}-{options.out.name}"
        if note.exists():
            note.unlink()
            raise InputError("it stops half-way", "go on")
        digest = str(hash_text(content))
        (run.path / "config.json").write_text(json.dumps({"digest": digest[:5]}))
        (run.path / "data.jsonl").write_text(json.dumps({"row": digest}) + "\n")
        write_text_model(run.path, digest)
        return run.finish({"value": float(int(digest, 16) % 7), "given": config.value})


def hash_text(text: str) -> str:
    from blake3 import blake3

    return blake3(text.encode()).hexdigest()[:16]


def called(name: str) -> object:
    """The value of a function, whose modules are read again."""
    module, _, function = name.partition(":")
    for known in [key for key in sys.modules if key.partition(".")[0] in ("userfn", "userhelp")]:
        del sys.modules[known]
    invalidate_caches()
    scope: dict[str, Any] = {}
    exec(f"import {module} as m", scope)
    return getattr(scope["m"], function)()


MIX = Stub(Mixing, "none", "none", "mixes", accelerated=False, body=mix)


@dataclass
class World:
    """A folder with inputs of the user's, and a pipeline that reads them."""

    place: Path
    random: Random
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {"gemma2": "1", "numpy": "1", "jinja2": "1"})
    did: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.place / "out"

    def build(self) -> None:
        """Write the inputs and draw the pipeline."""
        base = self.place / "base"
        base.mkdir(parents=True)
        write_text_model(base, "base")
        (base / "config.json").write_text('{"cap": 30}')
        (self.place / "rows").mkdir()
        for name in "ab":
            (self.place / "rows" / f"{name}.jsonl").write_text(json.dumps({"row": name}) + "\n")
        (self.place / "userhelp.py").write_text("VALUE = 1\n")
        (self.place / "userfn.py").write_text("import userhelp\n\ndef score():\n    return userhelp.VALUE\n")
        for number in range(self.random.randint(2, 6)):
            self.stages[f"s{number}"] = self.stage([*self.stages])

    def stage(self, before: list[str]) -> dict[str, Any]:
        """One stage, which may take outputs of earlier ones."""
        draw = self.random
        options: dict[str, Any] = {"value": draw.randint(0, 3)}
        found: dict[str, Any] = {"command": "mix", "options": options}
        some = [name for name in before if draw.random() < 0.5]
        if some and draw.random() < 0.7:
            options["model"] = f"${{{some[0]}.out}}"
        elif draw.random() < 0.5:
            options["model"] = str(self.place / "base")
        if len(some) > 1:
            options["models"] = [f"${{{name}.out}}" for name in some[1:]]
        if draw.random() < 0.4:
            rows = self.place / "rows"
            options["data"] = [str(draw.choice([rows, rows / "a.jsonl"]))]
            if before and draw.random() < 0.3:
                options["data"].append(f"${{{draw.choice(before)}.out}}")
        if draw.random() < 0.3:
            options["reward_fn"] = ["userfn:score"]
        if before and draw.random() < 0.25:
            options["text"] = f"x${{{draw.choice(before)}.summary.value}}"
        if before and draw.random() < 0.3:
            found["when"] = f"${{{draw.choice(before)}.summary.value}} < {draw.randint(2, 6)}"
        if before and draw.random() < 0.2:
            found["after"] = [draw.choice(before)]
        return found

    def pipeline(self, root: Path | None = None) -> Pipeline:
        return compiled(self.stages, root or self.root)

    # --- changes ------------------------------------------------------------------------------------------------------

    def change(self) -> None:
        """Do one thing that may happen to a pipeline between two runs."""
        name = self.random.choice(sorted(CHANGES))
        if CHANGES[name](self):
            self.did.append(name)

    def output(self) -> Path | None:
        """The output of a stage, if there is one."""
        found = [self.root / name for name in self.stages if (self.root / name / "gemma2.json").exists()]
        return self.random.choice(found) if found else None


def _file_of(world: World, names: tuple[str, ...] = ("model.safetensors", "config.json", "data.jsonl")) -> Path | None:
    out = world.output()
    path = out / world.random.choice(names) if out else None
    return path if path is not None and path.exists() else None


def _flip(path: Path) -> None:
    """Change the last byte but one, with the times set back as far as that goes."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_setting(world: World) -> bool:
    world.random.choice([*world.stages.values()])["options"]["value"] = world.random.randint(0, 3)
    return True


def change_config_of_the_base(world: World) -> bool:
    (world.place / "base" / "config.json").write_text(json.dumps({"cap": world.random.choice([8, 30])}))
    return True


def change_weights_of_the_base(world: World) -> bool:
    write_text_model(world.place / "base", world.random.choice(["base", "BASE"]))
    return True


def change_rows(world: World) -> bool:
    (world.place / "rows" / "a.jsonl").write_text(json.dumps({"row": world.random.choice("aA")}) + "\n")
    return True


def add_rows(world: World) -> bool:
    path = world.place / "rows" / "0.jsonl"
    path.unlink() if path.exists() else path.write_text('{"row": 0}\n')
    return True


def change_helper(world: World) -> bool:
    (world.place / "userhelp.py").write_text(f"VALUE = {world.random.randint(1, 2)}\n")
    return True


def damage(world: World) -> bool:
    path = _file_of(world)
    if path is not None:
        _flip(path)
    return path is not None


def lose_a_file(world: World) -> bool:
    path = _file_of(world)
    if path is not None:
        path.unlink()
    return path is not None


def cut_the_manifest(world: World) -> bool:
    path = _file_of(world, ("gemma2.json",))
    if path is not None:
        path.write_text(path.read_text()[:50])
    return path is not None


def lose_an_output(world: World) -> bool:
    out = world.output()
    if out is not None:
        shutil.rmtree(out)
    return out is not None


def touch(world: World) -> bool:
    path = _file_of(world, ("gemma2.json", "model.safetensors"))
    if path is not None:
        path.chmod(0o600)
        path.touch()
    return path is not None


def damage_and_touch_the_manifest(world: World) -> bool:
    path = _file_of(world)
    if path is not None:
        _flip(path)
        (path.parent / "gemma2.json").touch()
    return path is not None


def copy_the_folder(world: World) -> bool:
    if not world.root.exists():
        return False
    shutil.copytree(world.root, world.place / "copy")
    shutil.rmtree(world.root)
    (world.place / "copy").rename(world.root)
    return True


def other_version(world: World) -> bool:
    world.versions[world.random.choice(("gemma2", "numpy"))] = str(world.random.randint(1, 2))
    return True


def swap_inputs(world: World) -> bool:
    lists = [
        stage["options"]["models"] for stage in world.stages.values() if len(stage["options"].get("models", ())) > 1
    ]
    if lists:
        world.random.choice(lists).reverse()
    return bool(lists)


def interrupt_one(world: World) -> bool:
    """Run with one stage that stops half-way."""
    name = world.random.choice([*world.stages])
    world.root.mkdir(exist_ok=True)
    (world.root / f"{BREAKS}-{name}").write_text("")
    with suppress(StageFailed):
        run(world)
    (world.root / f"{BREAKS}-{name}").unlink(missing_ok=True)
    return True


CHANGES: dict[str, Callable[[World], bool]] = {
    change.__name__: change
    for change in (
        *(change_setting, change_config_of_the_base, change_weights_of_the_base, change_rows, add_rows, change_helper),
        *(damage, lose_a_file, cut_the_manifest, lose_an_output, touch, damage_and_touch_the_manifest),
        *(copy_the_folder, other_version, swap_inputs, interrupt_one),
    )
}


# --- running and comparing --------------------------------------------------------------------------------------------


class Recording(Inline):
    """Also keeps whether a job was continued."""

    def start(self, job: Any, wanted: int | None) -> None:
        self.resumed = {**getattr(self, "resumed", {}), job.stage: job.resume}
        super().start(job, wanted)


def run(world: World, root: Path | None = None, choice: Choice = ALL) -> tuple[Recording, dict[str, str]]:
    pipeline, executor = world.pipeline(root), Recording()
    pipeline.root.mkdir(parents=True, exist_ok=True)
    plan = check_pipeline(pipeline, choice, contents=False)
    result = run_stages(pipeline, plan, executor, choice=choice, observer=Watcher())
    return executor, dict(result.status)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("gemma2.json", "README.md")
    }


def check_case(place: Path, seed: int) -> list[str]:
    """One case: a pipeline, a run, changes; then plan, status, run and a fresh run agree. Returns what differs."""
    world = World(place, Random(seed))
    world.build()
    known = COMMANDS.get("mix")
    COMMANDS["mix"] = MIX
    sys.path.insert(0, str(place))
    try:
        with world_versions(world):
            return [f"seed {seed} ({', '.join(world.did)}): {line}" for line in differences_of(world)]
    finally:
        sys.path.remove(str(place))
        COMMANDS.pop("mix") if known is None else COMMANDS.update(mix=known)


def world_versions(world: World) -> Any:
    """Every part of the suite sees the versions of the world, and allows no others; models need no tokenizer."""
    stack = ExitStack()
    stack.enter_context(patch.dict(os.environ, {ALLOWED_VERSIONS: ""}))
    stack.enter_context(patch.object(CommandChecks, "inputs", lambda self, config: []))
    stack.enter_context(patch.object(version_rule, "versions", lambda: dict(world.versions)))
    return stack


def differences_of(world: World) -> list[str]:
    if world.random.random() < 0.9:
        run(world)
    for _ in range(world.random.randint(1, 4)):
        world.change()
    pipeline = world.pipeline()
    names = [*pipeline.stages]
    force = frozenset(name for name in names if world.random.random() < 0.1)
    choice, checked = _checked(pipeline, force)
    plan = {name: one.action for name, one in checked.items()}
    status = {name: one.action for name, one in look_at_pipeline(pipeline, choice).items()}
    found = [f"plan {plan} is not status {status}"] if plan != status else []
    executor, result = run(world, choice=choice)
    found += [line for name in names if (line := _against(checked[name], executor, result[name]))]
    after = {name: one.action for name, one in check_pipeline(world.pipeline(), contents=False).stages.items()}
    if not set(after.values()) <= {"skip", "not needed"}:
        found.append(f"after the run the plan is {after}")
    if run(world)[0].started:
        found.append("a second run ran something")
    _, fresh = run(world, world.place / "fresh")
    if fresh != result:
        found.append(f"the run ends with {result}, a fresh one with {fresh}")
    for name in names:
        if result[name] == "complete" and contents(world.root / name) != contents(world.place / "fresh" / name):
            found.append(f"{name} ({plan[name]}) has other bytes than a fresh one")
        if partial_path(world.root / name).exists() and result[name] == "complete":
            found.append(f"{name} left its partial directory")
    return found


def _checked(pipeline: Pipeline, force: frozenset[str]) -> tuple[Choice, Mapping[str, Checked]]:
    """The plan. An interrupted run that other versions began is refused: it is started over, as the error says."""
    while True:
        choice = Choice(force=force)
        try:
            return choice, check_pipeline(pipeline, choice, contents=False).stages
        except InputError as error:
            _, advised, name = str(error).partition("or start over with --force ")
            if not advised or name in force:
                raise
            force |= {name}


def _against(planned: Checked, executor: Recording, status: str) -> str:
    """What stands against the plan, for one stage."""
    name, action = planned.stage.name, planned.action
    ran = name in executor.started
    resumed = ran and executor.resumed[name]
    agrees = {
        "skip": not ran and status == "complete",
        "run": ran and (not resumed or GOES_ON_IF in planned.why),
        "again": ran and not resumed,
        "continue": ran and resumed,
        "not needed": not ran and status == "not needed",
        "perhaps": True,
    }
    return "" if agrees[action] else f"{name}: the plan says {action}; ran {ran}, resumed {resumed}, {status}"
