"""`gemma2 tiny`: the student at several widths, what is cached under which name, and the output of the command."""

from __future__ import annotations

import json
import multiprocessing
import signal
from dataclasses import fields, replace

import pytest

from gemma2.cli.app import invoke
from gemma2.core.errors import UsageError
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.safetensors_header import parameter_count
from gemma2.posttrain.models.loading import read_config
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import TinyConfig
from gemma2.posttrain.tiny import build
from gemma2.posttrain.tiny.build import cache_place, ensure_cached, recipe_of, run_tiny
from gemma2.posttrain.tiny.pretrain import RECIPES
from gemma2.posttrain.tiny.tasks import questions


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and trainings of two steps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for size, recipe in RECIPES.items():
        monkeypatch.setitem(build.RECIPES, size, replace(recipe, steps=2, batch=2))
    return tmp_path / "cache"


class Here:
    """A context of multiprocessing whose processes run in this one; `trained` has what they were asked for."""

    def __init__(self, monkeypatch):
        self.trained = []
        self.Pipe = multiprocessing.Pipe
        monkeypatch.setattr(build.multiprocessing, "get_context", lambda method: self)

    def Process(self, target, args, daemon):
        return Started(self, target, args)


class Started:
    exitcode = 0

    def __init__(self, context, target, args):
        self.context, self.target, self.args = context, target, args

    def start(self):
        _, size, _, width, _ = self.args
        self.context.trained.append((size, width))
        before = signal.getsignal(signal.SIGINT)
        self.target(*self.args)
        signal.signal(signal.SIGINT, before)

    def join(self):
        assert self.context.trained

    terminate = join


# --- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "parameters"),
    [
        # Embedding 512 w; 4 layers of attention 3 w^2, MLP 3 w f with f = 8 w / 3, four norms 4 w; one last norm w.
        (96, 512 * 96 + 4 * (3 * 96**2 + 3 * 96 * 256 + 4 * 96) + 96),  # 0.46 million
        (192, 512 * 192 + 4 * (3 * 192**2 + 3 * 192 * 512 + 4 * 192) + 192),  # 1.72 million
        (384, 512 * 384 + 4 * (3 * 384**2 + 3 * 384 * 1024 + 4 * 384) + 384),  # 6.69 million
    ],
)
def test_a_student_of_a_width_has_as_many_weights_as_its_shapes_say(width, parameters):
    model = recipe_of("student", width).network()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (width, 4)
    assert model.config.num_attention_heads * model.config.head_dim == width
    assert model.config.query_pre_attn_scalar == model.config.head_dim


def test_the_help_names_the_sizes_that_the_networks_have():
    description = TinyConfig.model_fields["width"].description
    for width in (96, 192, 384):
        size = sum(p.numel() for p in recipe_of("student", width).network().parameters())
        assert f"{size / 1e6:.1f}" in description, (width, size)


def test_another_width_changes_width_heads_mlp_and_the_learning_rate_alone():
    default, wide = RECIPES["student"], recipe_of("student", 192)
    assert recipe_of("student", 96) == default
    changed = {field.name for field in fields(default) if getattr(default, field.name) != getattr(wide, field.name)}
    assert changed == {"hidden", "head", "feedforward", "learning_rate"}
    assert (wide.hidden, wide.head, wide.feedforward) == (192, 48, 512)
    assert wide.learning_rate == pytest.approx(1.5e-3)  # half of it at twice the width


@pytest.mark.parametrize(
    ("width", "said"),
    [
        ("100", "--width 100 is not a multiple of 32"),
        ("0", "--width 0 is below 32"),
        ("2048", "--width 2048 is above 1024"),
        ("wide", "--width"),
    ],
)
def test_a_width_that_no_network_can_have_is_refused(tmp_path, width, said):
    with pytest.raises(UsageError) as caught:
        invoke(["tiny", "--width", width, "--out", str(tmp_path / "out"), "--dry-run"])
    assert said in str(caught.value) and caught.value.hint


# --- the cache --------------------------------------------------------------------------------------------------------


def test_students_are_cached_by_width_and_seed_and_the_teacher_by_seed_alone(cache):
    places = {(seed, width): cache_place("student", seed, width) for seed in (0, 1) for width in (96, 192, 384)}
    assert len(set(places.values())) == 6
    assert {cache_place("teacher", 0, width) for width in (96, 192, 384)} == {cache_place("teacher", 0, 96)}
    assert cache_place("teacher", 0, 96) != cache_place("teacher", 1, 96)
    assert cache_place("teacher", 0, 160) != cache_place("student", 0, 160)
    assert all(place.is_relative_to(cache) for place in places.values())


def test_another_code_is_cached_elsewhere(cache, tmp_path, monkeypatch):
    before = cache_place("student", 0, 96)
    other = tmp_path / "tasks.py"
    other.write_text("LARGEST_TERM = 9\n")
    monkeypatch.setattr(build.tasks, "__file__", str(other))
    assert cache_place("student", 0, 96) != before


def test_only_the_student_is_trained_for_another_width(cache, monkeypatch):
    context = Here(monkeypatch)
    first = ensure_cached(0, 32)
    assert context.trained == [("student", 32), ("teacher", 32)]
    teacher = (first["teacher"] / "model.safetensors").read_bytes()
    second = ensure_cached(0, 64)
    assert context.trained[2:] == [("student", 64)]
    assert second["teacher"] == first["teacher"]
    assert (second["teacher"] / "model.safetensors").read_bytes() == teacher
    assert ensure_cached(0, 32) == first and ensure_cached(0, 64) == second
    assert len(context.trained) == 3
    for width, places in ((32, first), (64, second)):
        assert read_config(places["student"])["hidden_size"] == width
        assert read_manifest(places["student"])["config"] == {"size": "student", "seed": 0, "width": width}
        assert read_manifest(places["teacher"])["config"]["width"] == 160


def test_a_cached_network_with_another_content_is_trained_again(cache, monkeypatch):
    context = Here(monkeypatch)
    place = ensure_cached(0, 32)["student"]
    (place / "config.json").write_text("{}")
    ensure_cached(0, 32)
    assert context.trained[2:] == [("student", 32)]
    assert read_config(place)["hidden_size"] == 32


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_output_has_both_networks_and_both_files_of_questions(cache, monkeypatch, tmp_path):
    Here(monkeypatch)
    config = TinyConfig(width=64, train_prompts=9, heldout_prompts=8, seed=3)
    result = run_tiny(config, RunOptions(tmp_path / "models"))
    for name, split, rows in (("prompts", "train", 9), ("heldout", "heldout", 8)):
        lines = (tmp_path / "models" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == questions(split, rows, seed=3)
    assert parameter_count(tmp_path / "models" / "student") == 512 * 64 + 4 * (3 * 64**2 + 3 * 64 * 171 + 256) + 64
    manifest = read_manifest(result.out)
    assert manifest["summary"]["student_parameters"] == parameter_count(tmp_path / "models" / "student")
    assert manifest["summary"]["teacher_parameters"] == 867_360
