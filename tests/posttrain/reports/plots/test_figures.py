"""Figures as documents: labels exist, hostile names stay text, nothing is loaded from elsewhere."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2.posttrain.reports.plots.figures import (
    curves_figure,
    front_figure,
    front_text,
    page_svg,
    reach,
    run_path,
    smooth,
    svg_text,
    write_figure,
)
from gemma2.posttrain.reports.plots.labels import WantedLabel, overlap, place_labels
from gemma2.posttrain.reports.plots.layermaps import ANGLES, KEPT, layer_map
from gemma2.posttrain.reports.plots.textplot import line_labels, off_chart

SVG = "{http://www.w3.org/2000/svg}"


def point(name, kind, kl, reward, iteration=None, eta=None, **more):
    fields = {"name": name, "kind": kind, "kl": kl, "reward": reward, "iteration": iteration, "eta": eta}
    return fields | {"kl_se": 0.1, "reward_se": 0.02} | more


def warp_points(policies=2):
    points = [point("SFT", "sft", 0.0, 0.4, kl_se=0.0), point("base", "base", 2.0, 0.2)]
    for m in range(policies):
        name = f"policy-{m}"
        points.append(point(name, "policy", 3 + m / 9, 0.7 + m / 50, 1))
        points += [
            point(f"{name} step {s}", "trajectory", 3 * s / 10, 0.4 + 0.03 * s, 1, run=name, step=s) for s in (0, 5, 10)
        ]
    points += [point(f"eta {eta:g}", "line", 3.2 * eta, 0.4 + 0.4 * eta**0.5, 1, eta) for eta in (0, 0.3, 0.8, 1)]
    return [*points, point("slerp", "slerp", 3.2, 0.8, 1)]


def texts(svg):
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_front_labels_its_points():
    shown = texts(svg_text(front_figure(warp_points())))
    for label in (
        "SFT",
        "base",
        "SLERP 1",
        "RL 1.1",
        "start to SLERP, by η",
        "during RL",
        "standard error",
        "η 0.3",
        "iteration 1",
        "KL to the SFT policy (nats per sequence)",
    ):
        assert label in shown
    assert "η 0" not in shown  # that point is the SFT policy


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("policies", [0, 1, 16])
def test_the_front_of_any_number_of_policies_draws_without_overlapping_labels(policies, narrow):
    figure = front_figure(warp_points(policies), narrow)
    renderer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    corners = [(box.x0, box.y0, box.x1, box.y1) for box in boxes]
    assert len(corners) >= 4
    assert not any(overlap(a, b) for i, a in enumerate(corners) for b in corners[:i])


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_labels_overlap_neither_each_other_nor_the_frame_on_any_front(data):
    inside = st.floats(0, 1)
    points = data.draw(st.lists(st.tuples(inside, inside), min_size=1, max_size=14))
    crowded = data.draw(st.booleans())  # all in the corner where the best points are
    places = [(550 + 45 * x, 300 + 35 * y) if crowded else (600 * x, 340 * y) for x, y in points]
    labels = [WantedLabel(x, y, 20 + 50 * data.draw(inside), 12, i < 6) for i, (x, y) in enumerate(places)]
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    boxes = place_labels(labels, marks, (0, 0, 600, 340))
    shown = [box for box in boxes if box is not None]
    assert not any(overlap(a, b) for i, a in enumerate(shown) for b in shown[:i])
    assert all(box[0] >= 0 and box[2] <= 600 and box[1] >= 0 and box[3] <= 340 for box in shown)
    assert all(box is not None for box in boxes[:6])  # the important ones are always there
    for box in boxes[6:]:
        assert box is None or not any(overlap(box, mark) for mark in marks)


def test_the_legend_names_every_mark_that_is_drawn():
    points = [*warp_points(), point("sft", "base", 0.5, 0.41), point("liti", "liti", 1.0, 0.6, 1)]
    shown = texts(svg_text(front_figure(points)))
    for name in ("before RL", "start of RL", "RL policy", "SLERP", "LITI", "start to SLERP, by η", "during RL"):
        assert name in shown
    assert "standard error" in shown and "95 % interval" not in shown
    bounded = [{**p, "reward_low": p["reward"] - 0.1, "reward_high": p["reward"] + 0.1} for p in points]
    assert "95 % interval" in texts(svg_text(front_figure(bounded)))


def test_the_curve_of_a_run_goes_from_its_start_through_its_evaluations_to_the_policy():
    path = run_path(warp_points(1), "policy-0")
    assert [p["name"] for p in path] == ["policy-0 step 0", "policy-0 step 5", "policy-0 step 10", "policy-0"]
    later = [p for p in warp_points(1) if p.get("step") != 0]
    assert [p["name"] for p in run_path(later, "policy-0")][:2] == ["SFT", "policy-0 step 5"]


def test_every_iteration_has_a_line_with_a_label():
    points = [*warp_points(), *(point(f"2/eta {eta}", "line", 5 * eta, 0.4 + eta, 2, eta) for eta in (0, 0.5, 1))]
    assert [text for _, text in line_labels(points)] == ["η 0.5", "iteration 2"]  # iteration 1 ends at its SLERP
    svg = svg_text(front_figure(points))
    assert {"SLERP 1", "iteration 2", "η 0.5"} <= set(texts(svg)) and "η 0.3" not in texts(svg)
    assert "iteration 2" in front_text(points)


def test_bars_are_intervals_if_known():
    near = point("SFT", "sft", 0.0, 0.4, reward_low=0.3, reward_high=0.7, kl_low=0.0, kl_high=0.0)
    assert reach(near, "reward") == [[pytest.approx(0.1)], [pytest.approx(0.3)]]
    assert reach(near, "kl") == [[0.0], [0.0]]
    assert reach(point("SFT", "sft", 0.0, 0.4), "reward") == 0.02
    assert "SFT: reward 0.400 (0.300 to 0.700), KL 0.00 (0.00 to 0.00) nats" in svg_text(front_figure([near]))


def test_many_runs_are_drawn_without_bars():
    def bars(policies):
        figure = front_figure(warp_points(policies))
        return sum(len(bars.get_segments()) for bars in figure.axes[0].collections)

    assert bars(16) < bars(12)


def test_a_front_of_one_point_draws():
    assert "SFT" in texts(svg_text(front_figure([point("SFT", "sft", 0.0, 0.4, kl_se=None, reward_se=None)])))


def test_tool_tips_have_name_and_figures():
    svg = svg_text(front_figure(warp_points()))
    titles = [node.text for node in ET.fromstring(svg).iter(f"{SVG}title")]
    assert "SLERP 1: reward 0.800 ± 0.02, KL 3.20 ± 0.1 nats" in titles


def test_hostile_names_stay_text():
    name = '<script>alert("$x$")</script>'
    svg = page_svg(layer_map({name: {"layer$0$&<b>": 80.0}}, ANGLES), "angles", f"{name}")
    assert "<script" not in svg
    assert name in texts(svg)
    assert "layer$0$&<b>" in texts(svg)


def test_a_page_figure_has_its_own_ids_theme_colours_and_no_foreign_address():
    svg = page_svg(front_figure(warp_points()), "front", "the front")
    root = ET.fromstring(svg)
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert ids and all(identifier.startswith("front-") for identifier in ids)
    links = [value for node in root.iter() for key, value in node.items() if key.endswith("href")]
    assert links and all(link.startswith("#front-") and link[1:] in ids for link in links)
    assert "var(--hue0, #0072b2)" in svg and "var(--ink, #1d232e)" in svg
    assert root.get("aria-label") == "the front" and root.get("viewBox") and root.get("width") is None
    assert "http" not in svg.replace("http://www.w3.org/", "")


def test_a_figure_that_is_drawn_again_keeps_its_layout_and_so_its_bytes():
    """In the layout of a second drawing, the labels would no longer be where there was room for them."""
    for policies, narrow in ((8, True), (12, False)):
        figure = front_figure(warp_points(policies), narrow)
        assert svg_text(figure) == svg_text(figure), policies


def test_the_same_points_give_the_same_files(tmp_path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        write_figure(front_figure(warp_points()), tmp_path / name)
    for suffix in ("svg", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_the_settings_of_matplotlib_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    write_figure(front_figure(warp_points()), tmp_path / "front.svg")
    assert dict(matplotlib.rcParams) == before


def test_the_heat_map_prints_degrees_and_marks_a_missing_angle():
    merges = {"SLERP 1": {"embedding": 81.4, "layer 0": None}, "SLERP 2": {"embedding": 12.0, "layer 0": 66.6}}
    shown = texts(svg_text(layer_map(merges, ANGLES)))
    assert {"81°", "-", "12°", "67°", "embedding", "SLERP 2"} <= set(shown)


def test_a_heat_map_of_many_layers_has_values_only_in_tool_tips():
    merges = {"SLERP 1": {f"layer {i}": 80.0 for i in range(42)}}
    svg = svg_text(layer_map(merges, ANGLES))
    assert "80°" not in texts(svg)
    assert "SLERP 1, layer 41: 80.0 degrees" in [node.text for node in ET.fromstring(svg).iter(f"{SVG}title")]


def test_a_heat_map_of_lengths_is_in_percent_and_tips_may_have_more():
    svg = svg_text(layer_map({"SLERP 1": {"0": 1.0}, "LERP 1": {"0": 0.7071}}, KEPT, tips={("LERP 1", "0"): "of <3>"}))
    assert {"100", "71"} <= set(texts(svg))
    assert "LERP 1, 0: 70.7 % kept, of <3>" in [node.text for node in ET.fromstring(svg).iter(f"{SVG}title")]


def test_a_larger_value_is_darker():
    fills = re.findall(
        r"fill: (#[0-9a-f]{6}); stroke: #ffffff", svg_text(layer_map({"x": {"a": 10.0, "b": 90.0}}, ANGLES))
    )
    light = [sum(int(fill[i : i + 2], 16) for i in (1, 3, 5)) for fill in fills]
    assert len(light) == 2 and light[0] > light[1]


@pytest.mark.parametrize("narrow", [False, True])
def test_curves_draw_the_metrics_that_the_rows_have(narrow):
    runs = {"policy-1": [{"step": s, "reward": s / 10, "kl": None, "iteration": 1} for s in range(9)], "empty": []}
    shown = texts(svg_text(curves_figure(runs, {"reward": "reward", "kl": "KL"}, narrow)))
    assert "reward" in shown and "KL" in shown


def test_smoothing_keeps_a_constant_and_the_length():
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smooth([1.0, 2.0]) == [1.0, 2.0]


# --- in the terminal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [50, 76, 120])
def test_the_text_keeps_to_its_width_and_shows_every_kind(width):
    text = front_text(warp_points(), width)
    assert max(map(len, text.splitlines())) <= width
    for part in ("SLERP 1", "SFT", "◆", "●", "○", "KL to the SFT policy"):
        assert part in text


def test_higher_reward_is_drawn_higher_and_more_kl_further_right():
    text = front_text([point("SFT", "sft", 0.0, 0.0), point("slerp", "slerp", 4.0, 1.0, 1)], 60)
    rows = text.splitlines()
    (high,), (low,) = ([i for i, row in enumerate(rows) if glyph in row] for glyph in "◆●")
    assert high < low
    assert rows[high].index("◆") > rows[low].index("●")
    assert rows[high].lstrip().startswith("1 ┤") and rows[low].lstrip().startswith("0 ┤")


def test_a_base_far_away_is_a_note_below_the_chart():
    points = [*warp_points(), point("raw", "base", 90.0, 0.1)]
    assert [p["name"] for p in off_chart(points)] == ["raw"]
    assert "off the chart: base, reward 0.10 at KL 90.00" in front_text(points)
    assert "off the chart: base, reward 0.10 at KL 90.00" in texts(svg_text(front_figure(points)))


def test_text_of_no_points_and_of_one_point():
    assert front_text([]) == "no policy was measured"
    assert "●" in front_text([point("SFT", "sft", 0.0, 0.4)])
