"""`gemma2 diff` as a user runs it: table, document, heat map, refusals."""

import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma2.cli.main import run
from gemma2.merging.inspect.difference import diff_models
from gemma2.posttrain.reports.plots.heatmap import grid_of, heat_map

CONFIG = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "tie_word_embeddings": True}
LAYER = {"self_attn.q_proj": (4, 4), "mlp.up_proj": (6, 4), "input_layernorm": (4,)}


def gemma2(command: str) -> int:
    """The exit code of a command line."""
    return run(shlex.split(command))


def write(path, seed, layers, scale):
    generator = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    shapes |= {f"model.layers.{i}.{kind}.weight": shape for i in range(layers) for kind, shape in LAYER.items()}
    base = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    own = np.random.default_rng(seed)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    weights = {
        name: value + scale * own.standard_normal(value.shape, np.float32) * (name != "model.norm.weight")
        for name, value in base.items()
    }
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, path / "model.safetensors")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base of two layers and two children of it; the final norm stays as it was."""
    monkeypatch.chdir(tmp_path)
    for name, seed, scale in (("base", 0, 0.0), ("a", 1, 0.01), ("b", 2, 0.01)):
        write(tmp_path / name, seed, 2, scale)
    return tmp_path


def rows(text):
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_the_screen_shows_a_row_per_layer_and_the_total(models, capsys):
    assert gemma2("diff a b") == 0
    captured = capsys.readouterr()
    head, *body = rows(captured.out)
    assert head == ["group", "relative", "angle", "cosine", "|b-a|", "largest", "|a|", "|b|", "parameters"]
    assert [row[0] for row in body] == ["embed_tokens", "layers.0", "layers.1", "norm", "total"]
    assert body[-1][-1] == "124"
    # The kernels are compiled once per machine, and a line says so: the first test of a fresh clone sees it.
    assert captured.err.endswith("warning: 1 of 4 groups are identical, norm for one\n")


def test_a_base_adds_the_task_vectors_and_tensors_are_rows_on_demand(models, capsys):
    assert gemma2("diff a b --base base --granularity tensor") == 0
    head, *body = rows(capsys.readouterr().out)
    assert head[:4] == ["group", "relative", "task angle", "task cosine"]
    assert head[-3:] == ["task |a|", "task |b|", "parameters"]
    assert len(body) == 2 + 2 * 3 + 1
    assert body[1][0] == "model.layers.0.input_layernorm.weight"


def test_json_is_the_whole_document(models, capsys):
    assert gemma2("diff a b --base base --json --threads 1") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["total"]["task_angle"] == pytest.approx(90, abs=25)
    assert [group["group"] for group in document["groups"]] == ["embed_tokens", "layers.0", "layers.1", "norm"]
    assert set(document["groups"][0]) >= {"cosine", "angle", "norm_base", "task_norm_a", "largest", "relative"}
    assert document["warnings"] == ["1 of 4 groups are identical, norm for one"]


def test_a_model_compared_with_itself_is_reported_as_identical(models, capsys):
    assert gemma2("diff a a") == 0
    assert capsys.readouterr().err == "warning: the models are identical: all 124 parameters are equal\n"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("diff a nowhere", 1, "model b nowhere is not a directory"),
        ("diff a b --plot x.pdf", 2, "--plot x.pdf is neither .svg nor .png"),
        ("diff a b --plot no/x.svg", 1, "no is not a writable directory"),
        ("diff a b --plot folder.svg --force", 1, "--plot folder.svg is a directory"),
        ("diff a b --plot old.svg", 1, "--plot old.svg exists; choose another name, or replace it with --force"),
        ("diff a b --threads 0", 2, "--threads"),
        ("diff a b --granularity model", 2, "granularity"),
        ("diff a", 2, "B"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_leaves_nothing(models, capsys, command, code, message):
    (models / "folder.svg").mkdir()
    (models / "old.svg").write_text("old")
    before = sorted(models.rglob("*"))
    assert gemma2(command) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(models.rglob("*")) == before


# --- the heat map ---------------------------------------------------------------------------------------------------


def test_the_plot_is_the_only_new_file_and_has_the_same_bytes_each_time(models, capsys):
    assert gemma2("diff a b --base base --plot one.svg") == 0
    assert rows(capsys.readouterr().out)[-1] == ["plot", "one.svg"]
    (models / "two.svg").write_text("old")
    assert gemma2("diff a b --base base --plot two.svg --force -q") == 0
    assert (models / "one.svg").read_bytes() == (models / "two.svg").read_bytes()
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "base", "one.svg", "two.svg"]
    text = (models / "one.svg").read_text()
    ElementTree.fromstring(text)
    for shown in ("a = a,  b = b", "Relative difference", "Angle between the task vectors", "q_proj", "input_norm"):
        assert shown in text
    tips = re.findall(r"<title>([^<]+)</title>", text)
    assert len([tip for tip in tips if re.match(r"layer 1, q_proj: \S+% of \|a\|, largest \S+, \S+ degrees", tip)]) == 2


def test_a_failed_png_leaves_the_old_file(models, monkeypatch):
    assert gemma2("diff a b --plot x.png -q") == 0
    before = (models / "x.png").read_bytes()
    assert before.startswith(b"\x89PNG")

    def fail(figure, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("gemma2.posttrain.reports.plots.heatmap.write_figure", fail)
    with pytest.raises(OSError, match="disk full"):
        gemma2("diff a b --plot x.png --force -q")
    assert (models / "x.png").read_bytes() == before
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "base", "x.png"]


def test_kinds_are_rows_in_the_order_of_a_forward_pass_and_other_tensors_are_at_the_side(models):
    grid = grid_of(diff_models(models / "a", models / "b"))
    assert grid.kinds == ["q_proj", "up_proj", "input_layernorm"]
    assert grid.layers == [0, 1]
    assert list(grid.others) == ["embed_tokens", "norm"]
    assert grid.cells["up_proj", 1].parameters == 24
    whole = sum(cell.norm_difference**2 for cell in grid.everything)
    assert whole**0.5 == pytest.approx(diff_models(models / "a", models / "b").total.norm_difference)


def test_experts_share_a_row_and_equal_last_names_are_written_in_full(models):
    found = diff_models(models / "a", models / "b")
    sums = list(found.sums.values())
    names = ["mlp.experts.0.w1.weight", "mlp.experts.11.w1.weight", "self_attn.norm.weight", "mlp.norm.weight"]
    renamed = {f"model.layers.3.{name}": part for name, part in zip(names, sums, strict=False)}
    grid = grid_of(type(found)(a=found.a, b=found.b, base=None, granularity="layer", sums=renamed))
    assert grid.kinds == ["mlp.norm", "self_attn.norm", "w1"]
    assert grid.cells["w1", 3].parameters == sums[0].parameters + sums[1].parameters
    assert heat_map(type(found)(a=found.a, b=found.b, base=None, granularity="layer", sums=renamed)).axes


@pytest.mark.parametrize("layers", [2, 26, 80])
def test_no_text_of_the_figure_overlaps_other_text_or_the_border(tmp_path, layers):
    for name, seed, scale in (("base", 0, 0.0), ("a", 1, 0.01), ("b", 2, 0.01)):
        write(tmp_path / name, seed, layers, scale)
    figure = heat_map(diff_models(tmp_path / "a", tmp_path / "b", base=tmp_path / "base"))
    figure.draw_without_rendering()
    labels = [
        label for axis in figure.axes for label in (*axis.get_xticklabels(), *axis.get_yticklabels(), *axis.texts)
    ]
    boxes = [text.get_window_extent() for text in (*figure.texts, *labels) if text.get_text() and text.get_visible()]
    width, height = figure.get_size_inches() * figure.dpi
    for number, box in enumerate(boxes):
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, box
        for other in boxes[number + 1 :]:
            apart = box.x1 <= other.x0 or other.x1 <= box.x0 or box.y1 <= other.y0 or other.y1 <= box.y0
            assert apart, (box, other)


def test_a_tensor_that_is_zero_in_a_is_not_shown_as_identical(models):
    found = diff_models(models / "a", models / "b")
    zero = {name: replace(part, squares=(0.0, *part.squares[1:])) for name, part in found.sums.items()}
    some = found.sums | {name: part for name, part in zero.items() if "input_layernorm" in name}
    for sums in (some, zero):
        texts = [text.get_text() for text in heat_map(replace(found, sums=sums)).texts]
        assert "white: identical, grey: a is zero, b is not" in texts


def test_identical_models_have_a_heat_map_too(models):
    assert gemma2("diff a a --base a --plot same.svg -q") == 0
    assert "white: identical" in (models / "same.svg").read_text()
