"""Recipes by command, size of the model and machine: which exist, what each needs, and why the others do not.

A recipe is for its machine if the planner's peak leaves `FREE` of every GPU. Its line says how many it uses (`--gpus`);
`--strategy` decides how they hold the models. The policies of warp have one each. Torch-free.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gemma2.configs import machine_recipes
from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.sizes import sizes_apart
from gemma2.posttrain.pipelines.compile import read_pipeline
from gemma2.posttrain.pipelines.references import lookup, replaced
from gemma2.posttrain.planning.memory import Lengths, MemoryPlace, MemoryPlan, memory_of, place_for
from gemma2.posttrain.planning.shapes import SIZES, ModelShape
from gemma2.posttrain.schemas.config import Config, resolve

from .schema_index import schema_for

__all__ = [
    "COMMANDS",
    "MACHINES",
    "Cell",
    "MachinePlan",
    "cell_named",
    "cells",
    "is_of_one_gpu",
    "least_plan",
    "no_recipe",
    "plan_of",
    "run_line",
]

FREE = 0.05  # of 24e9 or 80e9 bytes, for what a sum does not know; such GPUs have 3 to 7 % more than these
RUN = re.compile(r"^# Run: (.*)$", re.MULTILINE)
HUB_SIZE = re.compile(r"gemma-2-(2b|9b|27b)\b")
COMMANDS = ("sft", "distill", "reward", "rlhf", "warp")


@dataclass(frozen=True)
class Machine:
    """A kind of machine. capacity: bytes of one GPU, of which each of `nodes` has `gpus`."""

    words: str
    capacity: float
    gpus: int = 1
    nodes: int = 1


MACHINES = {
    "24gb": Machine("one GPU with 24 GB", 24e9),
    "80gb": Machine("one GPU with 80 GB", 80e9),
    "8x80gb": Machine("8 GPUs with 80 GB each", 80e9, 8),
    "multi-node": Machine("2 hosts with 8 GPUs of 80 GB each", 80e9, 8, 2),
}
# The settings with which a command needs least; `size` stands for the model.
LEAST: dict[str, JsonMapping] = {
    "sft": {"model": "size", "data": "rows.jsonl", "max_length": 256},
    "reward": {"model": "size", "data": "pairs.jsonl", "max_length": 256},
    "distill": {"model": "size", "teacher_cache": "cache", "max_length": 256},
    "rlhf": {"policy": "size", "prompts": "prompts.jsonl"},
    "warp": {"sft": "size", "prompts": "prompts.jsonl", "heldout": "heldout.jsonl"},
}
LEAST_RL: JsonMapping = {
    "reward_fn": "rewards:score",
    "lora_anchor": "factors",
    "prompts_per_step": 1,
    "n": 2,
    "max_new_tokens": 64,
}


@dataclass(frozen=True)
class Cell:
    """One command for one size of model on one kind of machine; a recipe exists for some of them."""

    command: str
    size: str
    machine: str

    @property
    def name(self) -> str:
        """The name of its recipe."""
        return f"{self.command}-{self.size}-{self.machine}"

    @property
    def path(self) -> Path | None:
        """Its recipe; None if it does not exist."""
        return machine_recipes().get(self.name)

    @property
    def flags(self) -> JsonMapping:
        """The flags with which the command uses the whole machine; the stages of warp have a GPU each."""
        machine = MACHINES[self.machine]
        several = machine.gpus > 1 and self.command != "warp"
        return {"gpus": machine.gpus, "nodes": machine.nodes} if several else {}


@dataclass(frozen=True)
class MachinePlan:
    """What a configuration needs on each GPU of the machine of a cell."""

    cell: Cell
    config: Config
    memory: MemoryPlan
    place: MemoryPlace

    @property
    def needed(self) -> float:
        """Bytes of the largest phase."""
        return self.memory.peak.bytes

    @property
    def fits(self) -> bool:
        """Whether the machine has that much, with some to spare."""
        return self.needed <= (1 - FREE) * self.place.capacity

    def parts(self, most: int = 99) -> str:
        """The largest parts of the largest phase as text, in GB."""
        parts = sorted(self.memory.peak.parts, key=lambda part: -part.bytes)
        return ", ".join(f"{part.name} {part.bytes / 1e9:.1f}" for part in parts[:most] if part.bytes >= 0.05e9)

    @property
    def sum(self) -> str:
        """The peak next to what a GPU has, as text."""
        each = " of each GPU" if MACHINES[self.cell.machine].gpus > 1 else ""
        return f"{self.needed / 1e9:.1f} of {self.place.capacity / 1e9:.0f} GB{each}"

    def as_json(self) -> JsonObject:
        """The plan as a JSON document; bytes."""
        peak = self.memory.peak
        return {
            "recipe": self.cell.name,
            "command": self.cell.command,
            "size": self.cell.size,
            "machine": MACHINES[self.cell.machine].words,
            "phase": peak.name,
            "needed": self.needed,
            "capacity": self.place.capacity,
            "fits": self.fits,
            "parts": {part.name: part.bytes for part in peak.parts},
            "phases": {phase.name: phase.bytes for phase in self.memory.phases},
        }


def cells() -> Iterator[Cell]:
    """Every command for every size on every machine."""
    yield from (Cell(command, size, machine) for command in COMMANDS for size in SIZES for machine in MACHINES)


def cell_named(name: str) -> Cell | None:
    """The cell of a name; None for any other name."""
    return next((cell for cell in cells() if cell.name == name), None)


# --- plans ------------------------------------------------------------------------------------------------------------


def plan_of(cell: Cell) -> MachinePlan:
    """The plan of a recipe. Raises InputError, as `no_recipe`, for a cell without one."""
    if cell.path is None:
        raise no_recipe(cell)
    return _planned(cell, _config_of(cell, cell.path))


def least_plan(cell: Cell) -> MachinePlan:
    """The plan of the settings with which the command needs least."""
    machine = MACHINES[cell.machine]
    several = machine.gpus * machine.nodes if cell.flags else 1
    values = {**LEAST[cell.command], "lora_rank": 8, "micro_batch_size": 1, "batch_size": several, **cell.flags}
    if cell.command in ("rlhf", "warp"):
        values |= {**LEAST_RL, "prompts_per_step": several}
        values.pop("batch_size")
    # Weights in few bits are not divided, so of several GPUs either may need less.
    plans = [
        _planned(cell, resolve(schema_for(cell.command), flags={**values, "base_bits": bits})) for bits in (None, 4)
    ]
    return min(plans, key=lambda plan: plan.needed)


def _planned(cell: Cell, config: Config) -> MachinePlan:
    def shape(path: Path) -> ModelShape:
        named = HUB_SIZE.search(str(path))
        found = SIZES[named[1] if named else cell.size]
        return replace(found, outputs=1) if str(path) == "reward" else found

    place = place_for(config, shape, Lengths(), "accelerator", MACHINES[cell.machine].capacity)
    memory = memory_of(config, shape, place)
    assert memory is not None, f"{cell.command} runs a model"
    return MachinePlan(cell, config, memory, place)


def run_line(path: Path) -> str:
    """The command line that a recipe states for itself."""
    found = RUN.search(path.read_text(encoding="utf-8"))
    assert found, f"{path} has no line '# Run: '"
    return found[1]


def _config_of(cell: Cell, path: Path) -> Config:
    """The configuration that the command line of a recipe gives; of a pipeline, that of its stage."""
    words = shlex.split(run_line(path))
    words = words[words.index("gemma2") + 1 :]
    if words[0] == "pipeline":
        file = read_pipeline(path)
        options = next(stage.options for stage in file.stages.values() if stage.command == cell.command)

        def of(name: str) -> object:
            return lookup(file.vars, name.split(".")[1:], name)

        return resolve(schema_for(cell.command), flags=replaced(options, of))
    flags = {
        word[2:].replace("-", "_"): value
        for word, value in zip(words[1::2], words[2::2], strict=True)
        if word not in ("--config", "--out")
    }
    return resolve(schema_for(cell.command), file=path, flags=flags)


# --- what cannot be done ----------------------------------------------------------------------------------------------


def is_of_one_gpu(cell: Cell) -> bool:
    """Whether a machine of several GPUs has no recipe since the one for a single GPU of this kind is enough."""
    single = replace(cell, machine="80gb")
    return MACHINES[cell.machine].gpus > 1 and cell.command != "warp" and not cell.path and single.path is not None


def no_recipe(cell: Cell) -> InputError:
    """Why there is no recipe for a cell, and the next that exists."""
    machine, least = MACHINES[cell.machine], least_plan(cell)
    single = replace(cell, machine="80gb")
    if is_of_one_gpu(cell):
        what = f"there is no recipe {cell.name}: one GPU is enough"
        hint = f"take {single.name} ({plan_of(single).sum}); with --gpus the others share each step"
        return InputError(what, hint, cell.name)
    needed, there = sizes_apart(least.needed, machine.capacity)
    close = f", of which a recipe leaves {FREE:.0%} free" if least.needed <= machine.capacity else ""
    what = (
        f"there is no recipe {cell.name}: {cell.command} of a {cell.size.upper()} needs {needed} with the least "
        f"settings ({least.parts(3)}), a GPU has {there}{close}"
    )
    found = [f"{one.name} ({plan_of(one).sum})" for one in _next_to(cell)]
    return InputError(what, f"the next that can: {' or '.join(found)}", cell.name)


def _next_to(cell: Cell) -> list[Cell]:
    """The recipes of the same command that are closest: this size on a larger machine, a smaller size on this one.

    Without one of this size, the largest that there is.
    """
    sizes, machines = list(SIZES), list(MACHINES)
    larger = [Cell(cell.command, cell.size, one) for one in machines[machines.index(cell.machine) + 1 :]]
    smaller = [Cell(cell.command, one, cell.machine) for one in sizes[: sizes.index(cell.size)][::-1]]
    found = [next((one for one in group if one.path), None) for group in (larger, smaller)]
    given = [one for one in found if one is not None]
    if not larger or found[0] is None:
        rest = [one for one in cells() if one.command == cell.command and one.path and one not in given]
        given += [one for one in rest[::-1] if one.size == rest[-1].size][-1:]
    return given
