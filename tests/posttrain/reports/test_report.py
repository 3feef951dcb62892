"""The report page of finished, partial and hostile runs, read with the standard library's parser."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
from finished_run import Run, broken, front, quickstart, warp

from gemma2.core.errors import InputError, OutputError
from gemma2.posttrain.reports.collect import collect, name_of
from gemma2.posttrain.reports.command_lines import command_of
from gemma2.posttrain.reports.page import write_report
from gemma2.posttrain.reports.plots.values import duration, number, rounded, with_error
from gemma2.posttrain.reports.sections import MergedGroup, group_label, thinned

SECTIONS = ["result", "front", "answers", "stages", "angles", "curves", "lineage", "settings"]
VOID = ("meta", "br", "hr", "img", "input", "link")


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails if tags do not nest."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.stack, self.parts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> does not close the innermost tag"

    def handle_data(self, data):
        if "body" in self.stack:
            self.parts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.parts).split())

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


def read(directory, tmp_path):
    html = write_report(directory, tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(html), html


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return quickstart(tmp_path_factory.mktemp("runs") / "q", steps=40)


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    return read(finished, tmp_path_factory.mktemp("report"))


def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "q")


@pytest.fixture
def plain(monkeypatch):
    """Use empty figures, since drawing takes most of the time, in tests about the rest of the page."""
    forms = {"wide": "<svg></svg>", "narrow": "<svg></svg>"}
    monkeypatch.setattr("gemma2.posttrain.reports.sections.both", lambda make, name, description: forms)


# --- a finished run -------------------------------------------------------------------------------------------------


def test_every_section_exists_once_and_is_linked(page):
    ids = page[0].values("id")
    assert [name for name in ids if name in SECTIONS] == SECTIONS
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in SECTIONS} <= set(page[0].values("href"))


def test_the_page_loads_nothing_and_needs_no_script(page):
    parsed, html = page
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(parsed.tags)
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert all(value.startswith("#") for value in [*parsed.values("href"), *parsed.values("xlink:href")])
    assert not parsed.values("src")
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/)[a-z]", html)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "default-src 'none'" in html


def test_the_table_has_the_figures_of_the_front_with_errors(page):
    text = page[0].text
    assert "2 policies × 2 iterations" in text
    for row in ("base −2.20 ± 0.06", "SFT where RL started −1.10 ± 0.06", "RL 1.2 best single run 0.39 ± 0.06",
                "SLERP 1 0.50 ± 0.06", "SLERP 2 1.50 ± 0.06", "SLERP 2, η 0.8 chosen"):  # fmt: skip
        assert row in text
    assert "KL to SFT, nats Accuracy, % Judge Length, tokens" in text
    assert "22 ± 3" in text  # accuracy of the base, percent


def test_the_verdict_is_over_the_start_and_over_the_best_single_run_each_with_its_error(page):
    # The chosen point: reward -1.1 + 2.6 * 0.8 ** 0.6 = 1.174, so +2.27 over SFT and +0.78 over the run with 0.39.
    text = page[0].text
    assert "SLERP 2, η 0.8 gains +2.27 ± 0.05 reward over SFT, the policy from which RL started." in text
    assert "no gain in reward over the best single run at no more KL (RL 1.2) could be shown: +0.8 ± 0.8." in text
    assert "over SFT, where RL started +2.27 ± 0.05 +0.04 ± 0.03 could be chance" in text
    assert "over the best single run at no more KL: RL 1.2 +0.8 ± 0.8 could be chance –" in text


def test_the_front_says_how_many_merges_gain_and_no_more_than_its_table(page):
    text = page[0].text
    assert "Where a line is above" not in text
    assert "No gain or loss of the 10 merged models against the single runs at no more KL could be shown" in text
    assert "SLERP 2 4.50 1.1 −0.5 to 2.7 RL 1.2" in text


def test_answers_before_and_after_are_side_by_side(page):
    text = page[0].text
    assert "What is 7 + 12? base Hmm, I am not sure" in text
    assert "SFT I think that it is probably 18." in text
    assert "SLERP 2, η 0.8 Sure! The answer is 19." in text


def test_every_stage_has_its_command(page):
    text = page[0].text
    for command in (
        "gemma2 tiny --out q/models",
        "gemma2 sft --learning-rate 0.001 --model q/models/student --data q/clean --epochs 3.0 --out q/sft",
        "gemma2 distill --model q/sft --teacher q/models/teacher --prompts q/models/prompts.jsonl --out q/distilled",
        "gemma2 pick --front q/warp/front --out q/warp/model",
        "gemma2 rlhf --seed 1 --policy q/warp/iteration-1/init --prompts q/models/prompts.jsonl"
        " --out q/warp/iteration-2/policy-1",
        "gemma2 merge slerp q/warp/iteration-1/policy-1 q/warp/iteration-1/policy-2 --base q/sft"
        " --out q/warp/iteration-1/slerp",
        "gemma2 merge liti q/warp/iteration-2/slerp --base q/warp/iteration-1/init --eta 0.3"
        " --out q/warp/iteration-2/init",
    ):
        assert command in text


def test_stages_are_listed_in_the_order_in_which_they_ran(finished):
    names = [stage.name for stage in collect(finished).stages]
    names = [name for name in names if not name.startswith("models/")]
    assert names[:7] == ["models", "data", "clean", "sft", "distilled", "pairs", "reward"]
    assert names[7:12] == [f"warp/iteration-1/{name}" for name in ("policy-1", "policy-2", "slerp", "init", "front")]
    assert names[-2:] == ["warp/front", "warp/model"]
    assert collect(finished).gaps == []


def test_lineage_links_parents_by_their_weights(page, finished):
    weights = {
        stage.name: stage.weights.removeprefix("blake3:")[:10] for stage in collect(finished).stages if stage.weights
    }
    text = page[0].text
    first = f"base sft {weights['sft']} input warp/iteration-1/policy-1 {weights['warp/iteration-1/policy-1']}"
    assert f"warp/iteration-1/slerp {weights['warp/iteration-1/slerp']} {first}" in text
    assert f"policy warp/iteration-1/init {weights['warp/iteration-1/init']}" in text


def test_configurations_and_versions_are_in_full(page):
    assert "learning_rate: 0.001 epochs: 3.0" in page[0].text
    assert "torch 2.13.0" in page[0].text


def test_figures_come_wide_and_narrow_and_described(page):
    labels = page[0].values("aria-label")
    assert len([label for label in labels if label.startswith("Reward over KL")]) == 2
    assert len([label for label in labels if label.startswith("Angle between")]) == 2
    assert len([label for label in labels if label.startswith("Length kept")]) == 2
    assert len([label for label in labels if label.startswith("Reward, KL and length")]) == 2
    assert len([label for label in labels if label.startswith("Graph of")]) == 2
    assert (
        "SLERP 1: reward 0.500 (0.380 to 0.620), KL 2.25 (2.12 to 2.38) nats" in page[0].text
    )  # a tip without a script


def test_the_page_shows_only_paths_that_the_user_named(page, finished):
    assert str(finished.parent) not in page[0].text.split("Settings and versions")[0]


# --- runs with gaps -------------------------------------------------------------------------------------------------


def test_one_policy_has_no_angles_and_says_so(tmp_path):
    run = Run(tmp_path / "q")
    run.stage("sft", "sft")
    warp(run, policies=1, iterations=1, steps=20)
    parsed, _ = read(tmp_path / "q", tmp_path)
    assert "No SLERP of two or more policies is recorded here." in parsed.text
    assert "This run has gaps." not in parsed.text


def test_sixteen_policies_render_and_stay_small(tmp_path):
    run = Run(tmp_path / "q")
    run.stage("sft", "sft")
    run.stage("models/student", "tiny")
    warp(run, policies=16, iterations=1, steps=400)
    parsed, html = read(tmp_path / "q", tmp_path)
    assert "15 more runs of this iteration" in parsed.text
    assert "q/warp/iteration-1/policy-16" in parsed.text
    assert len(html) < 3_000_000


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("warp/front", "warp/front is missing"),
        ("warp/front/samples.jsonl", "This directory has no sample answers"),
        ("warp/iteration-1/policy-2", "warp/iteration-1/policy-2 is missing"),
        ("warp/iteration-1/policy-2/metrics.jsonl", "warp/iteration-1/policy-2/metrics.jsonl is missing"),
        ("reward", "reward is missing"),
        ("warp", "No RL run with metrics is recorded here"),
        ("warp", "No SLERP of two or more policies is recorded here"),
    ],
)
def test_the_page_says_what_is_missing(finished, plain, tmp_path, gone, said):
    root = copy(finished, tmp_path)
    target = root / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    parsed, _ = read(root, tmp_path)
    assert said in parsed.text
    assert "This run has gaps." in parsed.text
    assert [name for name in parsed.values("id") if name in SECTIONS] == SECTIONS


def test_an_interrupted_stage_is_shown_as_unfinished(finished, plain, tmp_path):
    root = copy(finished, tmp_path)
    place = root / "warp/iteration-2"
    (place / "policy-2").rename(place / ".policy-2.partial")
    manifest = place / ".policy-2.partial" / "gemma2.json"
    state = json.loads(manifest.read_text())
    manifest.unlink()
    (place / ".policy-2.partial" / "run.json").write_text(json.dumps(state))
    parsed, _ = read(root, tmp_path)
    assert "warp/iteration-2/policy-2 did not finish (status unfinished)" in parsed.text
    assert ".partial" not in parsed.text


def test_a_run_in_a_partial_directory_is_shown_with_its_final_names(finished, tmp_path):
    root = copy(finished, tmp_path)
    (root / "warp").rename(root / ".warp.partial")
    found = collect(root)
    assert "warp/iteration-1/slerp" in [stage.name for stage in found.stages]
    assert found.front.points and found.gaps == []


def test_an_unfinished_output_is_read_from_its_partial_directory(finished, tmp_path):
    copy(finished, tmp_path).rename(tmp_path / ".q.partial")
    found = collect(tmp_path / "q")
    assert found.title == "q" and found.front.points


@pytest.mark.parametrize("content", ["{", "[]", '{"points": []}', '{"points": [{"name": "x"}]}', '{"points": 3}'])
def test_a_broken_front_is_a_gap(finished, plain, tmp_path, content):
    root = copy(finished, tmp_path)
    (root / "warp/front/front.json").write_text(content)
    parsed, _ = read(root, tmp_path)
    assert "warp/front/front.json" in parsed.text and "SLERP 2" in parsed.text  # from the front of iteration 2
    for path in root.glob("warp/iteration-*/front/front.json"):
        path.unlink()
    parsed, _ = read(root, tmp_path)
    assert "there is no front" in parsed.text and "SLERP 2, η 0.8 chosen" in parsed.text


def test_a_broken_manifest_and_torn_lines_are_gaps(finished, plain, tmp_path):
    root = copy(finished, tmp_path)
    (root / "reward/gemma2.json").write_text("{")
    with (root / "warp/iteration-1/policy-1/metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    parsed, _ = read(root, tmp_path)
    assert "reward cannot be read" in parsed.text
    assert "warp/iteration-1/policy-1/metrics.jsonl has 1 unreadable line" in parsed.text


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no output of a gemma2 command"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(InputError, match="not a directory"):
        write_report(tmp_path / "none", tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_failed_interrupted_and_blocked_stages_are_reported(tmp_path, plain):
    parsed, html = read(broken(tmp_path / "w"), tmp_path)
    text = parsed.text
    assert "16 policies × 5 iterations" in text
    assert "iteration-3/policy-2 failed: KL 201 nats passed --max-kl 200" in text
    assert "iteration-3/policy-5 did not finish (status interrupted)" in text
    assert "not started, because an earlier stage failed: iteration-3/slerp, iteration-3/init" in text
    assert "and 37 more" in text  # 3 of iteration 3, 19 of 4 and of 5, front and model, less the six that are named
    assert "iteration-3/policy-5/metrics.jsonl has 1 unreadable line" in text
    assert "42 more blocked" in text and ".partial" not in text
    assert "SLERP 2 1.50" in text  # the front of iteration 2 has the most points
    assert text.count("policy-2 → iteration-3/slerp") == 2  # in the wide and in the narrow graph
    assert len(html) < 3_000_000


def test_a_stage_that_was_not_needed_is_not_a_gap(finished, plain, tmp_path):
    root = copy(finished, tmp_path)
    state = json.loads((root / "pipeline.json").read_text())
    state["stages"]["warp/iteration-3/policy-1"] = {"command": "rlhf", "needs": [], "status": "not needed"}
    (root / "pipeline.json").write_text(json.dumps(state))
    assert collect(root).gaps == []
    assert "not needed" in read(root, tmp_path)[0].text


@pytest.mark.parametrize("content", ["{", "[]", '{"stages": 3}', '{"stages": {"x": 3}}'])
def test_a_broken_pipeline_file_does_not_stop_the_report(finished, plain, tmp_path, content):
    root = copy(finished, tmp_path)
    (root / "pipeline.json").write_text(content)
    assert "SLERP 2" in read(root, tmp_path)[0].text


def test_points_that_cannot_be_drawn_are_left_out_and_counted(finished, tmp_path):
    root = copy(finished, tmp_path)
    path = root / "warp/front/front.json"
    document = json.loads(path.read_text())
    good = {"name": "SFT", "kind": "sft", "kl": 0.0, "reward": 1.0}
    odd = [good | {"kl": None}, good | {"reward": float("nan")}, good | {"kind": "x"}, good | {"kind": "line"}, 3]
    strange = good | {"iteration": "two", "kl_se": "x", "reward_low": float("inf")}
    path.write_text(json.dumps(document | {"points": [*document["points"], *odd, strange]}))
    found = collect(root)
    total = len(document["points"]) + 6
    assert f"warp/front/front.json: 5 of {total} points cannot be used" in found.gaps
    assert found.front.points[-1]["iteration"] is None and found.front.points[-1]["kl_se"] is None


# --- one command alone ----------------------------------------------------------------------------------------------


def test_a_single_measurement_has_a_report(finished, tmp_path):
    shutil.copytree(finished / "warp/front", tmp_path / "front")
    parsed, _ = read(tmp_path / "front", tmp_path)
    assert "This run has gaps." not in parsed.text
    assert "SLERP 2 1.50 ± 0.06" in parsed.text
    assert [label for label in parsed.values("aria-label") if label.startswith("Reward over KL")]


def test_a_single_rl_run_has_a_report(finished, tmp_path):
    shutil.copytree(finished / "warp/iteration-1/policy-1", tmp_path / "rl")
    parsed, _ = read(tmp_path / "rl", tmp_path)
    assert "This run has gaps." not in parsed.text
    assert "gemma2 rlhf --seed 1" in parsed.text
    assert [label for label in parsed.values("aria-label") if label.startswith("Reward, KL and length")]


def test_policies_without_an_iteration_are_all_in_the_table(tmp_path, plain):
    run = Run(tmp_path / "f")
    run.stage("sft", "sft")
    front(run, "front", 2, 1, compared=("sft",))
    path = tmp_path / "f/front/front.json"
    document = json.loads(path.read_text())
    document["points"] = [p | {"iteration": None} for p in document["points"] if p["kind"] in ("sft", "policy")]
    path.write_text(json.dumps(document))
    assert "iteration-1/policy-1 0.37" in read(tmp_path / "f", tmp_path)[0].text


def test_policies_that_do_not_differ_from_the_start_are_not_ranked_and_nothing_is_drawn(finished, tmp_path):
    root = copy(finished, tmp_path)
    for path in root.rglob("front.json"):
        document = json.loads(path.read_text())
        for p in document["points"]:
            if p["kind"] not in ("base", "sft"):
                p |= {"kl": 2e-8, "kl_se": 1e-9}
        path.write_text(json.dumps(document))
    page, html = read(root, tmp_path)
    assert "These policies do not differ from the start" in page.text
    assert "compared with" not in page.text
    assert "best point within" not in page.text
    assert "dominates an area" not in page.text
    assert "Angle in degrees" not in page.text
    assert 'class="best"' not in html


# --- the front ------------------------------------------------------------------------------------------------------


def test_the_front_with_the_most_points_is_shown_and_the_latest_of_equals(finished, tmp_path):
    assert collect(finished).front.name == "warp/front"
    root = copy(finished, tmp_path)
    document = json.loads((root / "warp/front/front.json").read_text())
    document["points"] = [point for point in document["points"] if point["kind"] != "base"]
    (root / "warp/front/front.json").write_text(json.dumps(document))
    assert collect(root).front.name == "warp/front"  # as many as the front of iteration 2
    document["points"].pop()
    document["points"] = document["points"][:5]
    (root / "warp/front/front.json").write_text(json.dumps(document))
    assert collect(root).front.name == "warp/iteration-2/front"


def test_the_best_points_within_kl_limits_and_the_areas_have_intervals(page):
    text = page[0].text
    columns = "KL at most, nats Best point Chosen from, points Reward Reward on other prompts KL, nats"
    assert f"{columns} 2 SLERP 2, η 0.5 7 " in text
    assert "partly the luckiest" in text
    assert (
        "an area of 6.00 (5.81 to 6.19, 95 % interval) nats × reward, bounded by KL 4.70 (of RL 2.2, the farthest "
        "point with more reward than SFT) and reward −1.10 (of SFT)" in text
    )
    assert "iteration 1 5.00 4.81 to 5.19 – iteration 2 6.00 5.81 to 6.19 0.50 0.40 to 0.60" in text


def test_an_older_front_has_neither_table_nor_area(finished, plain, tmp_path):
    root = copy(finished, tmp_path)
    for path in root.glob("**/front.json"):
        points = json.loads(path.read_text())["points"]
        bare = [{k: v for k, v in point.items() if not k.endswith(("_low", "_high"))} for point in points]
        path.write_text(json.dumps({"points": bare}))
    text = read(root, tmp_path)[0].text
    assert "within each KL limit" not in text and "an area of" not in text and "SLERP 2 1.50 ± 0.06" in text


# --- merges ---------------------------------------------------------------------------------------------------------


def test_the_length_that_lerp_keeps_follows_from_lengths_and_angles():
    # Two of length 1 at 90 degrees: |(1, 1)| / 2 = 0.7071; lengths 3 and 1 at 0 degrees: (3 + 1) / 2 over their mean 2.
    right = {"group": "layers.0", "norms": [1.0, 1.0], "angles": [90.0], "result_norm": 1.0}
    assert MergedGroup(right).linear == pytest.approx(0.5**0.5) and MergedGroup(right).kept == 1.0
    assert MergedGroup(right | {"norms": [3.0, 1.0], "angles": [0.0]}).linear == pytest.approx(1.0)
    # Three at 60 degrees: |a + b + c|^2 = 3 + 2 * 3 * 0.5 = 6
    three = MergedGroup({"norms": [1.0] * 3, "angles": [60.0] * 3, "result_norm": 0.9})
    assert three.linear == pytest.approx(6**0.5 / 3) and three.angle == 60.0
    for gap in ({"angles": [None]}, {"angles": []}, {"norms": []}, {"norms": [0.0, 0.0]}):
        assert MergedGroup(right | gap).linear is None


def test_angles_of_many_pairs_are_shown_as_mean_and_range():
    group = MergedGroup({"norms": [1.0] * 3, "angles": [60.0, 70.0, None], "result_norm": 1.0})
    assert (group.angle, group.extremes) == (65.0, "60.0 to 70.0 over 2 pairs")


@pytest.mark.parametrize(("policies", "share"), [(2, "71"), (4, "50")])
def test_the_length_that_an_average_keeps_is_that_of_as_many_runs_as_were_merged(tmp_path, plain, policies, share):
    # M unrelated directions of length 1: the average has length sqrt(M) / M.
    run = Run(tmp_path / "q")
    run.stage("sft", "sft")
    run.stage("models/student", "tiny")
    warp(run, "", policies=policies, steps=20)
    text = read(run.finish(), tmp_path)[0].text.replace("\u00a0", " ")
    assert text.count("unrelated directions of equal length") == 1
    assert f"The average of {policies} unrelated directions of equal length has {share} % of that length." in text


def test_runs_of_several_seeds_are_not_mixed(tmp_path, plain):
    run = Run(tmp_path / "q")
    run.stage("sft", "sft")
    run.stage("models/student", "tiny")
    for seed in (0, 1):
        warp(run, f"seed-{seed}/", steps=20)
    text = read(run.finish(), tmp_path)[0].text
    assert "2 policies × 2 iterations" in text
    for name in ("seed-0/iteration-1", "seed-1/iteration-2"):
        assert f"2 RL runs of {name}" in text and f"{name} embedding" in text
    assert text.count("1 more run of this iteration") == 4


def test_a_stage_that_ran_again_keeps_its_place(finished, tmp_path):
    root = copy(finished, tmp_path)
    path = root / "warp/iteration-1/slerp/gemma2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": "2027-01-01T00:00:00Z"}))
    assert [s.name for s in collect(root).stages] == [s.name for s in collect(finished).stages]


# --- lineage --------------------------------------------------------------------------------------------------------


def test_the_graph_has_models_rows_and_stages_and_leads_to_their_entries(page):
    text, ids = page[0].text, page[0].values("id")
    edges = ["models → models/student (part)", "data → clean (data)", "clean → sft (data)", "pairs → reward (pairs)"]
    for edge in (*edges, "iteration-1/policy-1 → iteration-1/slerp (input)", "front → model (front)"):
        assert text.count(edge) == 2, edge
    links = [value for value in page[0].values("href") if value.startswith("#stage-")]
    assert links and {link[1:] for link in links} <= set(ids)


# --- hostile content ------------------------------------------------------------------------------------------------


def test_model_output_and_names_stay_text(finished, plain, tmp_path):
    evil = "</blockquote><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} &amp;"
    root = copy(finished, tmp_path)
    path = root / "warp/front/samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["completion"], row["prompt"] = evil, evil
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    front = json.loads((root / "warp/front/front.json").read_text())
    for point in front["points"]:
        point["name"] += evil
    (root / "warp/front/front.json").write_text(json.dumps(front))
    manifest = json.loads((root / "sft/gemma2.json").read_text())
    manifest |= {"config": {evil: evil}, "versions": {evil: evil}, "summary": {evil: 1.0}, "status": evil}
    (root / "sft/gemma2.json").write_text(json.dumps(manifest))
    parsed, _ = read(root, tmp_path)
    assert not {"script", "img"} & set(parsed.tags)
    assert not parsed.values("onerror")
    assert "<script>alert(1)</script>" in parsed.text
    assert "{{ 7 * 7 }}" in parsed.text


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_page_replaces_an_older_one_and_leaves_nothing_else(finished, plain, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("old")
    assert write_report(finished, out) == out
    assert "gemma2 report" in out.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [out]


def test_an_unwritable_path_is_an_output_error(finished, plain, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(finished, tmp_path / "file" / "report.html")


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(1.23456, 0.012, "1.235"), (1.23456, 0.051, "1.23"), (47.23, 3.1, "47"), (47.23, 1.4, "47.2"),
     (-2.0, 0.0, "−2.00"), (0.5, 0.00001, "0.5000")],
)  # fmt: skip
def test_the_error_decides_the_decimals_of_a_value(value, error, text):
    assert rounded(value, error) == text


def test_an_error_of_zero_is_not_shown():
    assert with_error({"kl": 0.0, "kl_se": 0.0}, "kl") == {"value": "0.00", "error": ""}
    assert with_error({"kl": 0.1, "kl_se": None}, "kl") == {"value": "0.10", "error": ""}
    assert with_error({}, "kl") == {"value": "–", "error": ""}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (456_000, "456,000"), (12345.6, "12,346"), (-1.5, "−1.5"), (None, "–"), (float("nan"), "–")],
)
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (None, "")])
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


def test_final_names_have_no_partial_directories():
    assert name_of("q/.warp.partial/iteration-1/.policy-1.partial") == "q/warp/iteration-1/policy-1"
    assert name_of("q/warp.partial/.hidden") == "q/warp.partial/.hidden"


def test_groups_are_named_by_their_layer():
    assert [group_label(g) for g in ("model.layers.12", "model.embed_tokens", "model.norm", "score")] == [
        "12", "embedding", "final norm", "score",
    ]  # fmt: skip


def test_thinning_keeps_every_evaluation():
    rows = [{"step": s} for s in range(1000)] + [{"step": s, "kind": "eval"} for s in range(0, 1000, 100)]
    kept = thinned(rows)
    assert sum(row.get("kind") == "eval" for row in kept) == 10
    assert 60 <= sum(row.get("kind") != "eval" for row in kept) <= 120


def test_commands_can_be_pasted_into_a_shell(finished):
    for stage in collect(finished).stages:
        words = shlex.split(command_of(stage, finished))
        assert not words or (words[0] == "gemma2" and words[-2] == "--out")
