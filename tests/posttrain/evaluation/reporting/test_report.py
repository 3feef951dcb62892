"""The report page of finished, partial and hostile runs, read with the standard library's parser."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
from finished_run import Run, quickstart, warp

from gemma2.merging.errors import InputError, OutputError
from gemma2.posttrain.evaluation.reporting.collect import collect, expected_of_warp, name_of
from gemma2.posttrain.evaluation.reporting.commands import command_of
from gemma2.posttrain.evaluation.reporting.page import write_report
from gemma2.posttrain.evaluation.reporting.sections import group_label, thinned
from gemma2.posttrain.evaluation.reporting.values import duration, number, rounded, with_error

SECTIONS = ["result", "front", "answers", "stages", "angles", "curves", "lineage", "settings"]
VOID = ("meta", "br", "hr", "img", "input", "link")


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

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
    """Empty figures, which take most of the time, where a test is about the rest of the page."""
    forms = {"wide": "<svg></svg>", "narrow": "<svg></svg>"}
    monkeypatch.setattr("gemma2.posttrain.evaluation.reporting.sections.both", lambda make, name, description: forms)


# --- a finished run -------------------------------------------------------------------------------------------------


def test_every_section_is_there_once_and_reachable(page):
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


def test_the_table_tells_the_figures_of_the_front_with_errors(page):
    text = page[0].text
    assert "2 policies × 2 iterations" in text
    for row in ("Base −2.20 ± 0.06", "SFT −1.10 ± 0.06", "Best single RL run 0.39 ± 0.06", "WARP 1 0.50 ± 0.06",
                "WARP 2 1.50 ± 0.06", "Chosen model, η = 0.8"):  # fmt: skip
        assert row in text
    assert "KL to SFT Accuracy, % Judge Length" in text
    assert "22 ± 3" in text  # accuracy of the base, percent


def test_the_verdict_counts_standard_errors(page):
    # reward 1.5 - -1.1 = 2.6 with sqrt(2) * 0.061 = 0.0863: 30.1; judge 0.0433 with 0.0170: 2.6, so under three
    assert "+2.60 reward, 30.1 standard errors" in page[0].text
    assert "+0.043 judge, 2.6 standard errors: could be chance" in page[0].text


def test_answers_before_and_after_stand_side_by_side(page):
    text = page[0].text
    assert "What is 7 + 12? Base Hmm, I am not sure" in text
    assert "SFT I think that it is probably 18." in text
    assert "WARP 2 Of course! The answer to your question is 19." in text


def test_every_stage_has_its_command(page):
    text = page[0].text
    for command in (
        "gemma2 tiny --out q/models",
        "gemma2 sft --learning-rate 0.001 --model q/models/student --data q/clean --epochs 3.0 --out q/sft",
        "gemma2 distill --model q/sft --teacher q/models/teacher --prompts q/models/prompts.jsonl --out q/distilled",
        "gemma2 rlhf --seed 1 --policy q/warp/iteration-1/init --prompts q/models/prompts.jsonl"
        " --out q/warp/iteration-2/policy-1",
        "gemma2 merge slerp q/warp/iteration-1/policy-1 q/warp/iteration-1/policy-2 --base q/sft"
        " --out q/warp/iteration-1/slerp",
        "gemma2 merge liti q/warp/iteration-2/slerp --base q/warp/iteration-1/init --eta 0.3"
        " --out q/warp/iteration-2/init",
    ):
        assert command in text


def test_stages_come_in_the_order_of_the_work(finished):
    names = [stage.name for stage in collect(finished).stages]
    assert names[:7] == ["models", "data", "clean", "sft", "distilled", "pairs", "reward"]
    assert names[7:11] == [f"warp/iteration-1/{name}" for name in ("policy-1", "policy-2", "slerp", "init")]
    assert names[-4:] == ["warp/front", "warp/model", "warp", "."]
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
    assert len([label for label in labels if label.startswith("Reward, KL and length")]) == 2
    assert "slerp: reward 0.500 ± 0.061, KL 2.25 ± 0.0675 nats" in page[0].text  # a tool tip without a script


def test_nothing_of_the_machine_is_on_the_page_but_what_the_user_named(page, finished):
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
    warp(run, policies=16, iterations=1, steps=400)
    parsed, html = read(tmp_path / "q", tmp_path)
    assert "15 more runs of this iteration" in parsed.text
    assert "q/warp/iteration-1/policy-16" in parsed.text
    assert len(html) < 3_000_000


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("warp/front", "No policy was measured"),
        ("warp/front/samples.jsonl", "No sample answers were kept"),
        ("warp/iteration-1/policy-2", "warp/iteration-1/policy-2 is missing"),
        ("warp/iteration-1/policy-2/metrics.jsonl", "policy-2/metrics.jsonl is missing"),
        ("reward", "reward is missing"),
        ("warp", "No RL run with metrics is recorded here"),
    ],
)
def test_what_is_missing_is_said(finished, plain, tmp_path, gone, said):
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


def test_a_run_that_works_inside_a_partial_directory_reads_by_its_final_names(finished, tmp_path):
    root = copy(finished, tmp_path)
    (root / "warp").rename(root / ".warp.partial")
    (root / ".warp.partial/gemma2.json").rename(root / ".warp.partial/run.json")
    found = collect(root)
    assert "warp/iteration-1/slerp" in [stage.name for stage in found.stages]
    assert found.front["points"]
    assert "warp did not finish (status unfinished)" in found.gaps


@pytest.mark.parametrize("content", ["{", "[]", '{"points": []}', '{"points": [{"name": "x"}]}', '{"points": 3}'])
def test_a_broken_front_is_a_gap(finished, plain, tmp_path, content):
    root = copy(finished, tmp_path)
    (root / "warp/front/front.json").write_text(content)
    parsed, _ = read(root, tmp_path)
    assert "front.json" in parsed.text and "No policy was measured" in parsed.text


def test_a_broken_manifest_and_torn_lines_are_gaps(finished, plain, tmp_path):
    root = copy(finished, tmp_path)
    (root / "reward/gemma2.json").write_text("{")
    with (root / "warp/iteration-1/policy-1/metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    parsed, _ = read(root, tmp_path)
    assert "reward cannot be read" in parsed.text
    assert "policy-1/metrics.jsonl has 1 unreadable lines" in parsed.text


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no output of a gemma2 command"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(InputError, match="not a directory"):
        write_report(tmp_path / "none", tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


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


def test_a_place_that_cannot_be_written_is_an_output_error(finished, plain, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(finished, tmp_path / "file" / "report.html")


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(1.23456, 0.012, "1.235"), (1.23456, 0.051, "1.23"), (47.23, 3.1, "47"), (47.23, 1.4, "47.2"),
     (-2.0, 0.0, "−2.00"), (0.5, 0.00001, "0.5000")],
)  # fmt: skip
def test_a_value_has_the_decimals_that_its_error_deserves(value, error, text):
    assert rounded(value, error) == text


def test_an_error_of_nothing_is_not_shown():
    assert with_error({"kl": 0.0, "kl_se": 0.0}, "kl") == {"value": "0.00", "error": ""}
    assert with_error({"kl": 0.1, "kl_se": None}, "kl") == {"value": "0.10", "error": ""}
    assert with_error({}, "kl") == {"value": "–", "error": ""}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (456_000, "456,000"), (12345.6, "12,346"), (-1.5, "−1.5"), (None, "–"), (float("nan"), "–")],
)
def test_numbers_read_well(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (None, "")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_paths_lose_the_marks_of_work_in_progress():
    assert name_of("q/.warp.partial/iteration-1/.policy-1.partial") == "q/warp/iteration-1/policy-1"
    assert name_of("q/warp.partial/.hidden") == "q/warp.partial/.hidden"


def test_a_warp_run_promises_its_outputs():
    assert expected_of_warp({"policies": 2, "iterations": 1}) == [
        "iteration-1/policy-1", "iteration-1/policy-2", "iteration-1/slerp", "iteration-1/init", "front", "model",
    ]  # fmt: skip
    assert expected_of_warp({}) == []


def test_groups_are_called_by_their_layer():
    assert [group_label(g) for g in ("model.layers.12", "model.embed_tokens", "model.norm", "score")] == [
        "12", "embedding", "final norm", "score",
    ]  # fmt: skip


def test_thinning_keeps_every_evaluation():
    rows = [{"step": s} for s in range(1000)] + [{"step": s, "kind": "eval"} for s in range(0, 1000, 100)]
    kept = thinned(rows)
    assert sum(row.get("kind") == "eval" for row in kept) == 10
    assert 60 <= sum(row.get("kind") != "eval" for row in kept) <= 120


def test_commands_survive_a_shell(finished):
    for stage in collect(finished).stages:
        words = shlex.split(command_of(stage, finished))
        assert not words or (words[0] == "gemma2" and words[-2] == "--out")
