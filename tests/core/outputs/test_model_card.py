"""Model cards: metadata that the hub reads, text that nothing in a file can break, a snippet that runs."""

import json
import re
import shutil
from html import unescape

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from gemma2.core.outputs.ancestry import ancestors_of, write_card
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import read_manifest, write_manifest
from gemma2.core.outputs.markdown import code, fenced, shown, table
from gemma2.core.outputs.model_card import Ancestor, Facts, metadata, model_card
from gemma2.merging import MergeRequest, merge

CAUSAL, CLASSIFIER = {"architectures": ["Gemma2ForCausalLM"]}, {"architectures": ["Gemma2ForSequenceClassification"]}


def facts(command="sft", parents=(), model=CAUSAL, **manifest):
    return Facts(
        name="out",
        manifest={"command": command, **manifest},
        config=model,
        chat=True,
        parents=tuple(parents),
    )


def ancestor(role="model", name="m", hub="", command="", parents=(), **stated):
    return Ancestor(role=role, name=name, digest=f"blake3:{name}", hub=hub, command=command, metadata=stated,
                    parents=tuple(parents))  # fmt: skip


HUB = ancestor(name="abc", hub="google/gemma-2-2b@c5ebcd40", license="gemma", language="en")
SFT = ancestor(name="sft", command="sft", parents=[HUB])


# --- metadata -------------------------------------------------------------------------------------------------------


def test_a_fine_tuned_model_names_its_base_on_the_hub_and_inherits_what_that_states():
    assert metadata(facts("sft", [HUB])) == {
        "base_model": "google/gemma-2-2b",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma2", "sft"],
        "license": "gemma",
        "language": "en",
    }


def test_the_base_is_found_through_local_models_whose_commands_become_tags():
    policy = ancestor("input", "rl", command="rlhf", parents=[ancestor("policy", "sft", "", "sft", [HUB])])
    other = ancestor("input", "it", "google/gemma-2-2b-it@1", license="gemma", language="en")
    found = metadata(facts("merge slerp", [ancestor("base", "sft", "", "sft", [HUB]), policy, other]))
    assert found["base_model"] == ["google/gemma-2-2b", "google/gemma-2-2b-it"]
    assert found["base_model_relation"] == "merge"
    assert found["tags"] == ["gemma2", "merge", "sft", "rlhf"]
    assert found["license"] == "gemma"


def test_without_the_hub_no_base_is_named_for_the_name_of_a_directory_links_to_nothing():
    found = metadata(facts("rlhf", [ancestor("policy", "iteration-1/init", "", "", [ancestor(name="my base!")])]))
    assert not {"base_model", "base_model_relation", "license", "language"} & found.keys()


def test_a_teacher_or_a_reward_model_is_not_a_base():
    teacher, rm = ancestor("teacher", "t", "o/t@1", license="x"), ancestor("reward", "rm", "o/rm@1", license="y")
    assert metadata(facts("rlhf", [HUB, teacher, rm]))["base_model"] == "google/gemma-2-2b"
    assert metadata(facts("rlhf", [HUB, teacher, rm]))["license"] == "gemma"
    assert "base_model" not in metadata(facts("tiny", [teacher]))


@pytest.mark.parametrize("other", [{"license": "apache-2.0"}, {}])
def test_a_licence_that_not_all_parents_state_is_left_out(other):
    models = [ancestor("input", "a", license="mit"), ancestor("input", "b", **other)]
    assert "license" not in metadata(facts("merge linear", models))
    assert "Licence: unknown" in model_card(facts("merge linear", models))


@pytest.mark.parametrize("gemma", [{"license": "gemma"}, {"hub": "google/gemma-2-9b@1"}])
def test_gemma_s_licence_holds_for_all_that_a_gemma_is_in(gemma):
    below = ancestor("base", "sft", command="sft", parents=[ancestor("model", "a", **gemma)])
    found = metadata(facts("merge linear", [ancestor("input", "b", license="mit"), below]))
    assert found["license"] == "gemma"


@pytest.mark.parametrize("command", ["export", "merge linear"])
def test_a_merged_adapter_is_a_fine_tuned_form_of_the_model_below_it(command):
    below = ancestor("adapter-base", "base", "google/gemma-2-2b@1", license="gemma")
    found = metadata(facts(command, [ancestor("input", "adapter"), below]))
    expected = ("google/gemma-2-2b", "finetune", "gemma")
    assert (found["base_model"], found["base_model_relation"], found["license"]) == expected
    two = [ancestor("input", "one"), below, ancestor("input", "two"), below]
    assert metadata(facts("merge linear", two))["base_model_relation"] == "merge"


def test_a_model_that_was_only_written_again_is_still_what_it_was():
    parts = [ancestor("input", name, f"org/{name}@1") for name in "ab"]
    merged = ancestor("input", "merged", command="merge slerp", parents=parts)
    again = ancestor("input", "again", command="export", parents=[merged])
    found = metadata(facts("export", [again]))
    assert (found["base_model"], found["base_model_relation"]) == (["org/a", "org/b"], "merge")
    assert metadata(facts("export", [SFT]))["base_model_relation"] == "finetune"
    packed = {**CAUSAL, "quantization_config": {"quant_method": "gptq"}}
    assert metadata(facts("export", [SFT], packed))["base_model_relation"] == "quantized"


def test_a_reward_model_is_a_classifier():
    found = metadata(facts("reward", [HUB], CLASSIFIER))
    assert (found["pipeline_tag"], found["tags"]) == ("text-classification", ["gemma2", "reward-model"])


def test_the_hub_s_own_parser_reads_the_front_matter():
    card = ModelCard(model_card(facts("merge slerp", [HUB, SFT])))
    expected = metadata(facts("merge slerp", [HUB, SFT]))
    assert {key: card.data.get(key) for key in expected} == expected
    assert card.text.lstrip().startswith("# out")


# --- text -----------------------------------------------------------------------------------------------------------

NASTY = "``` </details> | [x](javascript:a) <script> `a` \n---\nlicense: mit\x1b[31m 'q\": #"


def test_text_from_files_breaks_neither_metadata_nor_markdown():
    texts = {"config": {"note": NASTY, NASTY: 1}, "summary": {NASTY: 1.5, "text": NASTY}, "seed": 0}
    texts |= {"data": [{"path": NASTY, "digest": "blake3:12"}], "versions": {NASTY: "1"}}
    card = model_card(facts(NASTY, [ancestor("model", NASTY, "", NASTY)], **texts))
    assert "\x1b" not in card
    parsed = ModelCard(card)
    assert "license" not in parsed.data.to_dict()
    html = MarkdownIt("commonmark").enable("table").render(parsed.text)
    assert "<script>" not in html
    assert "<a " not in html
    assert (html.count("<details>"), html.count("</details>"), html.count("<h2>")) == (1, 1, 5)
    settings = re.search(r'<code class="language-yaml">(.*?)</code>', html, flags=re.DOTALL)[1]
    assert yaml.safe_load(unescape(settings)) == {"note": shown(NASTY), NASTY: 1}


def test_code_and_fences_hold_backticks():
    assert code("a`b") == "`` a`b ``"
    assert fenced("x\n````\ny", "text") == "`````text\nx\n````\ny\n`````"
    assert table(["a|b"], [["<i>"]]) == "| a\\|b |\n| --- |\n| \\<i\\> |"


def test_the_card_of_many_iterations_of_several_policies_is_written_fast():
    """M + 1 paths lead from each init of WARP to the one before: 6 ** 40 walks, 241 models."""
    init = ancestor("base", "sft", command="sft", parents=[HUB])
    for i in range(40):
        made = ancestor("policy", init.name, command=init.command, parents=init.parents)
        rl = [ancestor("input", f"{i}-{m}", command="rlhf", parents=[made]) for m in range(5)]
        slerp = ancestor("input", f"slerp-{i}", command="merge slerp", parents=[init, *rl])
        init = ancestor("base", f"init-{i}", command="merge liti", parents=[init, slerp])
    found = metadata(facts("pick", [init]))
    assert (found["base_model"], found["license"]) == ("google/gemma-2-2b", "gemma")
    assert "more lines" in model_card(facts("pick", [init]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/someone/models/sft", "sft"),
        ("/home/Some One/models/sft", "sft"),
        ("../../run/warp/front", "front"),
        ("~/models/sft", "sft"),
        ("/data/base+/data/adapter", "adapter"),
        ("/x/models--google--gemma-2-2b/snapshots/c5ebcd40", "google/gemma-2-2b@c5ebcd40"),
        ("http://host.lan:8000/v1", "(an address)"),
        ("see /home/me/a/b.txt, and ../c", "see b.txt, and c"),
        ("my.module:function", "my.module:function"),
        ("google/gemma-2-2b", "google/gemma-2-2b"),
        ("kl<=5", "kl<=5"),
        (["/a/b", {"k": "/c/d"}], ["b", {"k": "d"}]),
        (3, 3),
    ],
)
def test_nothing_of_this_machine_is_shown(value, expected):
    assert shown(value) == expected


def test_the_limits_name_missing_measurements_and_the_licence():
    assert "Nothing was measured" in model_card(facts("merge slerp", summary={"parameters": 3}))
    assert "Nothing was measured" not in model_card(facts("rlhf", summary={"reward": 3.0}))
    assert "which RL learns to please" in model_card(facts("rlhf"))
    assert "Licence: unknown; none is stated." in model_card(facts("tiny"))
    assert "Licence: `gemma`, that of the models" in model_card(facts("sft", [HUB]))


def test_the_lineage_lists_each_model_once_and_stays_short():
    base = ancestor("model", "base", command="sft", parents=[HUB])
    twice = model_card(
        facts("merge linear", [ancestor("input", "a", parents=[base]), ancestor("input", "b", parents=[base])])
    )
    assert twice.count("google/gemma-2-2b@c5ebcd40") == 1
    assert "(as above)" in twice
    many = model_card(facts("merge linear", [ancestor("input", f"m{i}") for i in range(200)]))
    assert "141 more lines" in many


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base with a card, two policies made from it, a reward model; random."""
    from gemma2.posttrain.tiny.networks import save_random

    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "rl-1", "rl-2")):
        save_random(root / name, seed)
    save_random(root / "rm", 7, kind="reward")
    (root / "base" / "README.md").write_text(
        "---\nlicense: gemma\nlanguage:\n- en\ntags: [x]\n---\n\n# The base's own\n"
    )
    for name in ("rl-1", "rl-2"):
        parents = [{"role": "policy", "path": "../base", "weights": digest_weights(root / "base")}]
        (root / name / "README.md").write_text("# The parent's own\n")
        write_manifest(root / name, {"command": "rlhf", "parents": parents, "status": "complete"})
    return root


@pytest.fixture(scope="module")
def merged(models):
    request = MergeRequest(method="slerp", models=(models / "rl-1", models / "rl-2"), base=models / "base")
    merge(request, out=models / "merged")
    return models / "merged"


def test_a_merge_has_its_own_card_which_the_manifest_records(models, merged):
    card = ModelCard.load(merged / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemma2", "merge", "rlhf"],
        "license": "gemma",
        "language": ["en"],
    }
    assert "The parent's own" not in card.text
    assert "A merge of 2 models and their base by `slerp`." in card.text
    assert "README.md" in read_manifest(merged)["files"]
    assert str(models) not in card.content


def test_a_model_that_is_recorded_as_its_own_parent_ends_the_line(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "loop")
    own = {"role": "model", "path": ".", "weights": digest_weights(tmp_path / "loop")}
    write_manifest(tmp_path / "loop", {"command": "sft", "status": "complete", "parents": [own, own]})
    first, second = ancestors_of(read_manifest(tmp_path / "loop"), tmp_path / "loop")
    assert first == second
    assert [found.parents for found in first.parents] == [(), ()]


def test_each_eta_has_its_card(models, tmp_path):
    request = MergeRequest(method="liti", models=(models / "rl-1",), base=models / "base", etas=(0.25, 0.5))
    merge(request, out=tmp_path / "out")
    for eta in ("0.25", "0.50"):
        assert f"| eta | {float(eta):g} |" in (tmp_path / "out" / f"eta-{eta}" / "README.md").read_text()


def test_the_same_merge_writes_the_same_card(models, merged, tmp_path):
    request = MergeRequest(method="slerp", models=(models / "rl-1", models / "rl-2"), base=models / "base")
    merge(request, out=tmp_path / "merged")
    assert (tmp_path / "merged" / "README.md").read_bytes() == (merged / "README.md").read_bytes()


def test_a_parent_that_is_another_model_by_now_is_not_followed(models):
    manifest = read_manifest(models / "rl-1")
    (known,) = ancestors_of(manifest, models / "rl-1")
    assert known.metadata["license"] == "gemma"
    record = {"role": "input", "path": "rl-1", "weights": "blake3:another"}
    (other,) = ancestors_of({"parents": [record]}, models)
    assert (other.name, other.command, other.parents) == ("rl-1", "", ())
    (gone,) = ancestors_of({"parents": [record | {"path": "gone"}]}, models)
    assert (gone.name, gone.parents) == ("gone", ())


UNREADABLE = ("", "no front matter", "---\n[1, 2]\n---\n", "---\n: :\n- {\n---\n", "---\nlicense: [1]\n---\n")


@pytest.mark.parametrize("text", [*UNREADABLE, f"---\nlicense: {'x' * 999}\n---\n"])
def test_a_parent_s_card_that_cannot_be_read_states_nothing(models, tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    (found,) = ancestors_of({"parents": [{"role": "model", "path": ".", "weights": ""}]}, tmp_path)
    assert found.metadata == {}


def snippet(directory):
    (found,) = re.findall(r"```python\n(.*?)\n```", (directory / "README.md").read_text(), flags=re.DOTALL)
    return found


def printed(directory, monkeypatch, capsys):
    """The text that the snippet prints when it runs in the model's directory."""
    monkeypatch.chdir(directory)
    exec(compile(snippet(directory), "snippet", "exec"), {})
    return capsys.readouterr().out


def test_the_snippet_of_a_policy_runs(merged, monkeypatch, capsys):
    assert len(printed(merged, monkeypatch, capsys)) > 1


def test_the_snippet_of_a_reward_model_gives_gemma2_s_own_score(models, monkeypatch, capsys):
    from gemma2.posttrain.rewards.model import RewardModel

    write_card(models / "rm", {"command": "reward", "parents": []}, models / "rm")
    question, answer = [{"role": "user", "content": "What is 2 + 3?"}], "5"
    expected = RewardModel.from_dir(models / "rm").score_text([question], [answer], [False])
    assert float(printed(models / "rm", monkeypatch, capsys)) == pytest.approx(expected.item(), abs=1e-5)


def test_without_a_chat_template_or_a_tokenizer_the_snippet_uses_none(models, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((models / "base" / name).read_bytes())
    write_card(tmp_path, {"command": "convert", "parents": []}, tmp_path)
    assert "apply_chat_template" not in snippet(tmp_path)
    compile(snippet(tmp_path), "snippet", "exec")
    (tmp_path / "tokenizer.json").unlink()
    write_card(tmp_path, {"command": "convert", "parents": []}, tmp_path)
    assert "okenizer" not in snippet(tmp_path)
    compile(snippet(tmp_path), "snippet", "exec")


def test_training_writes_the_card_before_the_manifest(models, tmp_path):
    from gemma2.posttrain.runs.run_directory import RunOptions, open_run
    from gemma2.posttrain.schemas import EvalConfig

    config = EvalConfig(model=models / "base", sft=models / "base", prompts=models / "base" / "config.json")
    options = RunOptions(tmp_path / "tuned")
    with open_run("sft", config, options) as run:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copy(models / "base" / name, run.path)
        run.finish({"loss": 1.25, "loss_se": 0.031, "rows": 1200, "kept": None})
    card = ModelCard.load(tmp_path / "tuned" / "README.md")
    assert card.data.license == "gemma"
    assert card.data.get("base_model") is None  # its ancestor is a directory, not a model of the hub
    assert "| loss | 1.25 ± 0.031 |\n| rows | 1,200 |" in card.text
    assert "README.md" in json.loads((tmp_path / "tuned" / "gemma2.json").read_text())["files"]
    assert str(tmp_path) not in card.content
    assert str(models) not in card.content
    with open_run("pareto", config, RunOptions(tmp_path / "figures")) as run:
        run.finish({})
    assert not (tmp_path / "figures" / "README.md").exists()
