"""How processes hold what they train: what is asked for, else ddp where it leaves 15 % free, decided by rank 0."""

from pathlib import Path

import pytest

from gemma2.core.ranks import Ranks
from gemma2.posttrain.launch import strategy
from gemma2.posttrain.launch.strategy import needed_on_one, strategy_of
from gemma2.posttrain.planning.memory import SPARE, MemoryPlace, memory_of
from gemma2.posttrain.planning.shapes import shape_of
from gemma2.posttrain.runs.machine import MAIN, Memory
from gemma2.posttrain.schemas import SftConfig
from gemma2.posttrain.tiny.networks import random_model

SEVERAL = 4


class Heard(Ranks):
    """Rank 0 of several, which sends what it decides."""

    def on_main(self, work):
        sent.append(work())
        return sent[-1]


class Follower(Ranks):
    """Another rank: it hears what rank 0 has decided, and decides nothing."""

    def on_main(self, work):
        return sent[-1]


class Said:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


sent: list[str] = []


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(place)
    return SftConfig(model=place, data=(Path("rows"),), max_length=64)


@pytest.mark.parametrize(
    ("asked", "size", "found"),
    [("auto", 1, "one"), ("ddp", 1, "one"), ("fsdp", 1, "fsdp"), ("ddp", SEVERAL, "ddp"), ("fsdp", SEVERAL, "fsdp")],
)
def test_what_is_asked_for_is_done_without_a_word(config, asked, size, found):
    said = Said()
    assert strategy_of(config.model_copy(update={"strategy": asked}), Ranks(0, size), said) == found
    assert said.notes == []


@pytest.mark.parametrize("kind", ["cpu", "accelerator"])
@pytest.mark.parametrize(("spare", "found"), [(SPARE + 0.001, "ddp"), (SPARE - 0.001, "fsdp"), (-1.0, "fsdp")])
def test_auto_is_ddp_where_a_share_stays_free(config, monkeypatch, kind, spare, found):
    needed = memory_of(config, shape_of, MemoryPlace(kind, SEVERAL)).peak.bytes
    free = needed / (1 - spare) * (SEVERAL if kind == "cpu" else 1)  # processes on a CPU share its memory
    monkeypatch.setattr(strategy, "free_memory", lambda: Memory(free, MAIN if kind == "cpu" else "NVIDIA H"))
    said = Said()
    assert strategy_of(config, Heard(0, SEVERAL), said) == found
    assert len(said.notes) == 1 and f"strategy: {found} on {SEVERAL} processes: " in said.notes[0]
    monkeypatch.setattr(strategy, "free_memory", lambda: Memory(free * 100, "another machine"))
    assert strategy_of(config, Follower(1, SEVERAL)) == found


def test_a_model_of_unknown_size_is_divided(config, monkeypatch):
    monkeypatch.setattr(strategy, "_needed", lambda config, place: float("nan"))
    monkeypatch.setattr(strategy, "place_for", lambda *_: MemoryPlace("accelerator", SEVERAL, True))
    said = Said()
    assert strategy_of(config, Heard(0, SEVERAL), said) == "fsdp"
    assert "the size of a model is not known" in said.notes[0]


def test_what_one_gpu_needs_is_what_the_plan_says(config):
    plan = memory_of(config, shape_of, MemoryPlace("accelerator", capacity=1e9))
    assert needed_on_one(config, 1e9) == plan.peak.bytes
