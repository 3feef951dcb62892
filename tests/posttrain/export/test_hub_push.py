"""`gemma2 export --push`: what goes to the hub, in one commit, again after a failure; and what stays here."""

import json

import pytest
import yaml
from upload_hub import TOKEN

from gemma2.cli import main
from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.digests import digest_weights
from gemma2.core.outputs.manifest import write_manifest
from gemma2.posttrain.export.exporting import export, plan_export
from gemma2.posttrain.schemas.config import resolve
from gemma2.posttrain.schemas.delivery.export import ExportConfig

# httpx's word to huggingface_hub, whose upload of a large file it is.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def policy(models, tmp_path):
    """A policy in three shards with a parent on the hub, and files that are nobody else's business."""
    out = tmp_path / "release"
    export(config(models / "policy", shard_size="15kB"), out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps({**settings, "name_or_path": str(models)}))
    (out / "samples.jsonl").write_text('{"prompt": "private"}\n')
    manifest = json.loads((out / "gemma2.json").read_text())
    manifest["parents"][0]["hub"] = "google/gemma-2-2b@0123"
    write_manifest(out, {**manifest, "command": "sft"})
    return out


def config(model, **given):
    return resolve(ExportConfig, flags={"model": model, **given})


def front_of(card):
    return yaml.safe_load(card.decode().split("---\n")[1])


def run(capsys, *words):
    code = main.run(["export", *map(str, words)])
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    return code, captured


def test_the_model_and_its_card_go_up_in_one_commit_to_a_private_repository(hub, policy, models, capsys):
    code, _ = run(capsys, policy, "--push", "org/name")
    made = hub.repositories["org/name"]
    assert (code, made.private, made.commits) == (0, True, 1)
    weights = {file.name: file.read_bytes() for file in policy.glob("*.safetensors*")}
    assert len(weights) == 4
    assert {name: data for name, data in made.files.items() if name in weights} == weights
    assert not {"gemma2.json", "samples.jsonl", "merge.yaml"} & made.files.keys()
    front = front_of(made.files["README.md"])
    assert (front["base_model"], front["base_model_relation"], front["license"]) == (
        "google/gemma-2-2b", "finetune", "gemma",
    )  # fmt: skip
    assert b"Gemma Terms of Use" in made.files["NOTICE"]
    for secret in (TOKEN, str(policy.parent), str(models)):
        assert all(secret.encode() not in data for data in made.files.values())
    assert all(TOKEN not in file.read_text(errors="replace") for file in policy.iterdir())


def test_after_a_failure_the_same_command_sends_only_what_is_missing(hub, policy, capsys):
    hub.fault = lambda number: 403 if number == 3 else None
    code, captured = run(capsys, policy, "--push", "org/name")
    assert code == 1 and captured.err.count("error:") == 1
    assert hub.repositories["org/name"].files == {}, "half a model is not shown"
    sent, hub.fault = len(hub.storage), lambda number: None
    assert sent == 2
    hub.puts = 0
    assert run(capsys, policy, "--push", "org/name")[0] == 0
    assert hub.puts == len(hub.storage) - sent
    assert hub.repositories["org/name"].commits == 1


def test_weights_of_an_earlier_upload_are_removed(hub, policy, models, capsys):
    run(capsys, policy, "--push", "org/name")
    hub.repositories["org/name"].files["notes.txt"] = b"the user's"
    code, captured = run(capsys, models / "policy", "--push", "org/name")
    files = hub.repositories["org/name"].files
    assert code == 0 and "of an earlier upload is removed" in captured.err
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    assert "notes.txt" in files


def test_a_public_repository_needs_a_word(hub, models, capsys):
    run(capsys, models / "policy", "--push", "org/open", "--public")
    assert hub.repositories["org/open"].private is False
    before = hub.puts
    code, captured = run(capsys, models / "policy", "--push", "org/open")
    assert code == 1 and "is public" in captured.err and hub.puts == before


def test_a_token_that_may_not_write_is_one_line_without_the_token(hub, models, capsys, monkeypatch):
    hub.token = "another"
    code, captured = run(capsys, models / "policy", "--push", "org/name")
    assert code == 1 and "does not let this token write" in captured.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, captured = run(capsys, models / "policy", "--push", "org/name")
    assert code == 1 and "HF_HUB_OFFLINE" in captured.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    code, captured = run(capsys, models / "policy", "--push", "org/name")
    assert code == 1 and "HF_TOKEN" in captured.err


def test_a_hub_that_repeats_the_token_is_masked(hub, models, capsys):
    hub.fault, hub.says = (lambda number: 400), f"bad request by {TOKEN}"
    code, captured = run(capsys, models / "policy", "--push", "org/name", "--json")
    assert code == 1 and json.loads(captured.out)["error"]["kind"] == "input"


def test_a_dry_run_lists_files_and_bytes_and_sends_nothing(hub, policy, capsys):
    code, captured = run(capsys, policy, "--push", "org/name", "--dry-run", "--json")
    plan = json.loads(captured.out)
    assert code == 0 and hub.requests == []
    assert plan["visibility"] == "private"
    assert plan["upload_bytes"] == sum(row["bytes"] for row in plan["files"])
    assert {"samples.jsonl", "gemma2.json"} <= set(plan["left_out"])
    run(capsys, policy, "--push", "org/name")
    assert {row["file"]: row["bytes"] for row in plan["files"]} == {
        name: len(data) for name, data in hub.repositories["org/name"].files.items()
    }


def test_what_doctor_calls_broken_is_refused_unless_the_user_insists(hub, policy, capsys):
    (policy / "generation_config.json").write_text('{"eos_token_id": 600}')
    code, captured = run(capsys, policy, "--push", "org/name")
    assert code == 1 and "gemma2 doctor" in captured.err and hub.requests == []
    assert run(capsys, policy, "--push", "org/name", "--anyway")[0] == 0


def test_an_adapter_goes_up_with_the_hub_s_name_of_its_base(hub, models, capsys):
    code, captured = run(capsys, models / "adapter", "--push", "org/lora", "--keep-adapter")
    assert code == 1 and "--base-model" in captured.err
    base = "google/gemma-2-2b-it"
    code, _ = run(capsys, models / "adapter", "--push", "org/lora", "--keep-adapter", "--base-model", base)
    files = hub.repositories["org/lora"].files
    assert code == 0
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == base
    front = front_of(files["README.md"])
    assert (front["base_model"], front["base_model_relation"], front["license"]) == (base, "adapter", "gemma")
    assert all(str(models).encode() not in data for data in files.values())
    with pytest.raises(UsageError, match="merged into its base"):
        plan_export(config(models / "adapter", push="org/lora"), None)


def test_figures_of_an_evaluation_are_the_card_s_model_index(hub, models, tmp_path, capsys):
    row = {"task": {"type": "text-generation"}, "dataset": {"name": "MMLU", "type": "mmlu"},
           "metrics": [{"type": "acc", "value": 52.2}]}  # fmt: skip
    measured = {"name": "policy", "weights": digest_weights(models / "policy")}
    (tmp_path / "results.json").write_text(json.dumps({"model_index": [row], "model": measured}))
    assert run(capsys, models / "policy", "--push", "org/name", "--results", tmp_path)[0] == 0
    front = front_of(hub.repositories["org/name"].files["README.md"])
    assert front["model-index"] == [{"name": "policy", "results": [row]}]
    with pytest.raises(InputError, match="measured policy, a model with other weights"):
        plan_export(config(models / "reward", push="org/name", results=tmp_path), None)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="no rows for a model card"):
        plan_export(config(models / "policy", push="org/name", results=tmp_path), None)


def test_a_finished_export_is_only_uploaded_with_resume(hub, models, tmp_path, capsys):
    words = (models / "policy", "--dtype", "bfloat16", "--out", tmp_path / "out", "--push", "org/name")
    hub.fault = lambda number: 403
    assert run(capsys, *words)[0] == 1
    written, hub.fault = (tmp_path / "out" / "gemma2.json").stat().st_mtime_ns, lambda number: None
    assert run(capsys, *words)[0] == 1, "the output exists"
    assert run(capsys, *words, "--resume")[0] == 0
    assert (tmp_path / "out" / "gemma2.json").stat().st_mtime_ns == written
    other = config(models / "policy", dtype="float16", push="org/name")
    with pytest.raises(OSError, match="not an export"):
        export(other, tmp_path / "out", resume=True)


def test_a_gguf_file_goes_up_as_a_quantised_form_of_its_ancestor(hub, policy, tmp_path, capsys):
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('GGUF')\n"
    )
    (policy / "tokenizer.model").write_text("pieces")
    words = ("--gguf", "q8_0", "--llama-cpp", tmp_path, "--out", tmp_path / "gguf", "--push", "org/gguf")
    assert run(capsys, policy, *words)[0] == 0
    files = hub.repositories["org/gguf"].files
    assert sorted(files) == ["NOTICE", "README.md", "release-q8_0.gguf"]
    front = front_of(files["README.md"])
    found = (front["base_model"], front["base_model_relation"], front["license"], front["library_name"])
    assert found == ("google/gemma-2-2b", "quantized", "gemma", "gguf")


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"public": True}, "--public"),
        ({"license": "mit"}, "--license"),
        ({"base_model": "org/base"}, "--base-model"),
        ({"results": "results"}, "--results"),
    ],
)
def test_what_is_for_a_repository_is_refused_without_one(given, flag):
    """Each of these shapes the card of a push; without a push it would be dropped in silence."""
    with pytest.raises(ValueError, match=f"{flag} is about a repository; give --push ORG/NAME too"):
        ExportConfig(model="model", **given)
    assert ExportConfig(model="model", push="org/name", **given)
