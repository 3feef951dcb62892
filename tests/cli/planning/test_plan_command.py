"""`gemma2 plan COMMAND ...` as it is typed: the command's own line, its flags anywhere, and one document for --json."""

import json

import pytest
from light_model import light_model

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.planning.memory import Lengths, MemoryPlace, memory_of
from gemma2.posttrain.planning.shapes import shape_of
from gemma2.posttrain.planning.verdicts import CARDS, GB
from gemma2.posttrain.schemas import SftConfig

GIB = 2.0**30


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    light_model(tmp_path / "model")
    light_model(tmp_path / "b")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n' * 20)
    return tmp_path


def test_json_may_stand_in_front(place, capsys):
    assert invoke(["plan", "--json", "sft", "--model", "2b"]) == 0
    assert json.loads(capsys.readouterr().out)["verdicts"]


@pytest.fixture
def planned(place, capsys):
    def run(line: str):
        assert invoke(["plan", *line.split(), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_size_needs_nothing_on_disk_and_every_card_has_a_verdict(planned):
    document = planned("sft --model 9b")
    assert document["model"] == "9b (9,241,705,984 parameters: Gemma 2 of this size, nothing on disk)"
    assert [one["has_gib"] for one in document["verdicts"][1:]] == [float(f"{size * GB / GIB:.5g}") for size in CARDS]
    sums = memory_of(SftConfig(model="9b", data="x"), shape_of, MemoryPlace("accelerator"), Lengths())
    assert {one["needs_gib"] for one in document["verdicts"][1:]} == {float(f"{sums.peak.bytes / GIB:.5g}")}
    parts = {part.name: part.bytes / GIB for part in sums.peak.parts}
    gpu = planned("sft --model 9b --gpu 24GB")["memory"]
    [train] = [one["parts"] for one in gpu["phases"] if one["phase"] == gpu["peak"] == "train"]
    assert train.keys() == parts.keys()
    assert train["optimizer"] == pytest.approx(parts["optimizer"], rel=1e-4)


def test_flags_of_plan_are_taken_before_the_command_and_among_its_own(planned):
    places = (
        "--gpu 24GB --gpus 2 sft --model 2b",
        "sft --gpu 24GB --model 2b --gpus 2",
        "sft --model 2b --gpu 24 --gpus 2",
    )
    documents = [planned(line) for line in places]
    assert documents[0] == documents[1] == documents[2]
    ddp, fsdp = documents[0]["verdicts"]
    assert fsdp["needs_gib"] < ddp["needs_gib"]
    assert [one["place"] for one in (ddp, fsdp)] == ["2 x GPU of 24 GB, ddp", "2 x GPU of 24 GB, fsdp"]
    assert documents[0]["memory"]["place"] == fsdp["place"]  # what auto comes to
    [only] = planned("sft --model 2b --gpu 24GB --gpus 2 --strategy ddp")["verdicts"]
    assert only == ddp
    with pytest.raises(UsageError, match="merge slerp runs in one process; leave out --gpus"):
        invoke(["plan", "--gpus", "2", "merge", "slerp", "model", "b", "--base", "model"])


def test_several_gpus_are_those_of_a_usual_size_where_none_is_named(planned, capsys):
    document = planned("rlhf --policy 9b --reward 9b --gpus 8 --engine vllm --vllm-tensor-parallel 8")
    assert document["memory"]["place"] == "8 x GPU of 80 GB, fsdp"
    assert [one["fits"] for one in document["verdicts"] if one["place"] == "8 x GPU of 80 GB, fsdp"] == [True]
    machines = planned("sft --model 9b --gpus 4 --nodes 2 --strategy fsdp --batch-size 16")
    assert {one["place"].partition(" GPU")[0] for one in machines["verdicts"]} == {"8 x"}


def test_a_dry_run_of_several_gpus_says_the_strategy_and_the_memory_of_one(place, capsys):
    words = "sft --model model --data rows.jsonl --out out --eval-fraction 0 --gpus 2 --dry-run --json"
    assert invoke(words.split()) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["processes"], document["strategy"]) == (2, "ddp")
    assert document["memory_of"] == "a GPU of 80 GB, of which this machine has none"
    assert invoke([*words.split(), "--strategy", "fsdp"]) == 0
    assert json.loads(capsys.readouterr().out)["strategy"] == "fsdp"


def test_time_comes_from_a_rate_or_is_not_known(planned):
    data = "sft --model model --data rows.jsonl --max-steps 10 --batch-size 4 --eval-fraction 0"
    unknown = planned(data)["time"]
    assert unknown["time"].startswith("not known") and "hours" not in unknown
    tokens = unknown["tokens_trained_about"]
    assert planned(f"{data} --throughput 50")["time"]["hours"] == float(f"{tokens / 50 / 3600:.3g}")
    without = planned("sft --model 2b --throughput 50")["time"]
    assert without["tokens_trained_about"] is None and "no rows" in without["time"]


def test_memory_is_that_of_the_longest_rows_that_were_read(planned):
    limit = planned("sft --model model --max-length 4096")["verdicts"][0]["needs_gib"]
    rows = planned("sft --model model --max-length 4096 --data rows.jsonl")["verdicts"][0]["needs_gib"]
    assert rows < limit


def test_every_stage_and_checkpoint_of_warp_is_counted_on_the_disk(planned):
    document = planned("warp --sft 2b --reward 2b --policies 3 --iterations 2")
    names = [stage["stage"] for stage in document["stages"]]
    assert names[:4] == ["iteration-1/policy-1", "iteration-1/policy-2", "iteration-1/policy-3", "iteration-1/slerp"]
    model = 2_614_341_888 * 4 / GIB
    disk = document["disk"]
    assert disk["6 policies"] == disk["6 anchors next to them"] == pytest.approx(6 * model, rel=1e-4)
    assert disk["2 merges"] == disk["2 inits"] == pytest.approx(2 * model, rel=1e-4)
    assert disk["checkpoints of 1 at a time"] == pytest.approx(3 * 4 * model, rel=1e-4)  # weights, moments, anchor


def test_commands_without_a_model_are_planned_as_by_their_dry_run(place, capsys):
    for line in ("merge slerp model b --base model", "diff model b", "inspect model", "convert model --out out"):
        assert invoke(["plan", *line.split()]) == 0
        first = capsys.readouterr().out
        assert invoke([*line.split(), "--dry-run"]) == 0
        assert capsys.readouterr().out == first
    with pytest.raises(UsageError, match="merge slerp runs no model of yours; leave out --gpu"):
        invoke(["plan", "merge", "slerp", "model", "b", "--base", "model", "--gpu", "24GB"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sft --modle 9b", "o such option: --modle"),
        ("sft --model 9b --max-length 2", "--max-length 2 is below 8"),
        ("sft --model 9b --set max_lenght=8", "max_length"),
        ("sft --model 9b --gpu many", "--gpu many is not the memory of a GPU"),
        ("sft --model 9b --gpu 0", "--gpu 0 is not the memory of a GPU"),
        ("sfft --model 9b", "there is no command 'sfft' to plan; did you mean 'sft'"),
        ("watch out", "gemma2 watch has nothing to plan"),
        ("rlhf --policy 9b", "no reward is given"),
    ],
)
def test_mistakes_are_those_of_the_command(place, line, words):
    with pytest.raises(UsageError, match=words):
        invoke(["plan", *line.split()])


def test_the_models_of_a_plan_are_checked_as_those_of_a_run(place):
    with pytest.raises(InputError, match="--reward model is a policy"):
        invoke(["plan", "rlhf", "--policy", "2b", "--reward", "model"])
    with pytest.raises(InputError, match="a vocabulary of"):
        invoke(["plan", "distill", "--model", "model", "--teacher", "9b"])


def test_a_person_sees_parts_phases_verdicts_and_flags(place, capsys):
    assert invoke(["plan", "rlhf", "--policy", "2b", "--reward", "2b", "--gpu", "48GB"]) == 0
    shown = capsys.readouterr().out
    assert "the peak is train" in shown and "train (peak)" in shown
    for part in ("weights", "gradients", "optimizer", "EMA anchor", "reference", "reward models", "KV cache", "logits"):
        assert part in shown
    assert "does not fit" in shown and "GPU of 48 GB: add --" in shown
    assert "not known: gemma2 plan takes --throughput" in shown


BARE = (
    "sft --model 2b",
    "distill --model 2b --teacher 9b",
    "distill cache --teacher 9b",
    "reward --model 2b",
    "reward probe --model 2b",
    "reward pairs --model 2b --judge math:fsum",
    "reward score 2b",
    "reward eval 2b 9b",
    "rlhf --policy 2b --reward 2b",
    "warp --sft 2b --reward 2b",
    "generate --teacher 27b",
    "eval --model 2b --sft 2b --reward 2b",
    "eval suite 2b",
    "pareto --sft 2b --policies 2b,9b --reward 2b",
    "filter",
)


def refused(constant):
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("line", BARE)
def test_every_command_has_a_plan_without_a_file(place, line, capsys):
    assert invoke(["plan", *line.split(), "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert "time" in document
    assert ("verdicts" in document) == (line != "filter")
    assert not [name for name, value in document.items() if value != value], "no NaN"
