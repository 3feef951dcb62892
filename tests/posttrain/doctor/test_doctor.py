"""`gemma2 doctor`: published sizes, values, attention, runs of the model, pairs, --fix and the command."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_models import (
    SLOW,
    config,
    copy,
    doubled_bos,
    exchanged_turn_tokens,
    generation,
    in_bf16,
    missing_tensor,
    no_format,
    put,
    remove,
    setting,
    sharded,
    template,
    tokenizer,
    tokenizer_settings,
    weights,
    without_post_processor,
)
from processes import finish, gemma2, start
from safetensors.numpy import load_file

from gemma2.core.errors import InputError, UsageError
from gemma2.core.outputs.safetensors_header import read_header
from gemma2.posttrain.doctor.checks import attention_probe
from gemma2.posttrain.doctor.checks.config_checks import SIZES
from gemma2.posttrain.doctor.checks.finding import Depth
from gemma2.posttrain.doctor.checks.subject import Subject
from gemma2.posttrain.doctor.checks.weight_file_checks import gemma2_shapes
from gemma2.posttrain.doctor.checks.weight_value_checks import values_of
from gemma2.posttrain.doctor.examination import MODEL_CHECKS, check_names, examine
from gemma2.posttrain.doctor.machine_checks import MACHINE_CHECKS, TESTED
from gemma2.posttrain.doctor.repair import repair
from gemma2.posttrain.tiny.networks import save_random

ROOT = Path(__file__).resolve().parents[3]

# --- published sizes --------------------------------------------------------------------------------------------------


def write_sparse(path, size, **more):
    """A model in the shapes of a published size, whose weights use no disk space."""
    path.mkdir()
    keys = vars(SIZES[size])
    settings = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 256000, **keys, **more}
    (path / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 107]}))
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in gemma2_shapes(settings, classifier=False).items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return path


# Parameters of the Hugging Face vocabulary: ../shared/design/science.md, from the published checkpoints.
@pytest.mark.parametrize(("size", "count"), [("2B", 2_614_341_888), ("9B", 9_241_705_984), ("27B", 27_227_128_320)])
def test_a_published_size_is_known(tmp_path, size, count):
    path = write_sparse(tmp_path / size, size)
    assert sum(tensor.count for tensor in Subject(path).tensors.values()) == count
    found = {one.name: one for one in examine([path], Depth.QUICK)}
    assert found["size"].message == f"Gemma 2 {size}"
    assert {one.status for one in found.values()} == {"ok"}


def test_the_scale_that_the_9b_once_shipped_is_a_problem(tmp_path):
    path = write_sparse(tmp_path / "m", "9B", query_pre_attn_scalar=224)
    (found,) = examine([path], Depth.QUICK, only=["query-scale"])
    assert (found.status, found.message) == ("problem", "query_pre_attn_scalar is 224 instead of 256")


def test_a_9b_configuration_over_smaller_weights_is_named(tmp_path):
    path = write_sparse(tmp_path / "m", "2B")
    put(path / "config.json", **vars(SIZES["9B"]))
    (found,) = examine([path], Depth.QUICK, only=["size"])
    assert found.status == "problem" and "hidden_size 3584 (tensors: 2304)" in found.message


QUICK = """
import sys
from pathlib import Path
from gemma2.cli.main import run
code = run(["doctor", sys.argv[1], "--quick", "--json"])
loaded = [name for name in ("torch", "transformers", "numpy", "tokenizers") if name in sys.modules]
assert not loaded, loaded
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
assert int(peak.split()[1]) < 200_000, peak
sys.exit(code)
"""


def test_quick_reads_a_27b_without_torch_and_in_little_memory(tmp_path):
    code, out, err = finish(start(QUICK, write_sparse(tmp_path / "m", "27B")))
    assert code == 0, err
    document = json.loads(out)
    assert document["ok"] and {"name", "subject", "status", "message", "fix"} == set(document["checks"][0])


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0, 1, 70_000, 99_999])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, dtype, place, value):
    from safetensors.torch import save_file as save

    tensor = torch.linspace(-5, 5, 100_000).to(dtype)
    tensor[place] = value
    save({"t": tensor}, tmp_path / "t.safetensors")
    assert values_of(read_header(tmp_path / "t.safetensors")["t"]).bad == place


def test_largest_and_smallest_finite_values_are_finite(tmp_path):
    from safetensors.torch import save_file as save

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        info = torch.finfo(dtype)
        save({"t": torch.tensor([info.max, info.min, info.tiny, -0.0], dtype=dtype)}, tmp_path / "t.safetensors")
        found = values_of(read_header(tmp_path / "t.safetensors")["t"])
        assert (found.bad, found.constant, found.zero) == (-1, False, False)


# --- attention --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def without_cap(network, tokens):
    network.config.attn_logit_softcapping = None
    for layer in network.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    return network(tokens).logits


@torch.no_grad()
def without_window(network, tokens):
    network.config.sliding_window = 4096
    for layer in network.model.layers:
        layer.self_attn.sliding_window = None
    network.config.layer_types = ["full_attention"] * 2
    return network(
        tokens, attention_mask={name: causal(tokens) for name in ("full_attention", "sliding_attention")}
    ).logits


def causal(tokens):
    length = tokens.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)


def test_the_probe_tells_a_back_end_that_drops_cap_or_window(sound):
    fakes = {"same": lambda network, tokens: network(tokens).logits, "no cap": without_cap, "no window": without_window}
    found = {one.name: one for one in attention_probe.probe(Subject(sound / "policy"), fakes)}
    assert found["same"].right and found["same"].largest == 0
    for name in ("no cap", "no window"):
        assert not found[name].right and found[name].largest > 0.1, found


def test_the_back_ends_of_this_suite_are_right(sound):
    (found,) = {one.status for one in examine([sound / "policy"], only=["attention"])}
    assert found == "ok"


# --- runs of the model ------------------------------------------------------------------------------------------------


def test_weights_that_are_worse_than_chance_are_a_problem(sound):
    found = list(examine([sound / "policy"], Depth.DEEP, only=["loss"]))
    assert found[0].status == "problem" and "uniform guess 6.24" in found[0].message  # ln 512


def test_scores_of_a_sound_reward_model_and_of_one_with_a_wrong_pad(sound, tmp_path):
    assert {one.status for one in examine([sound / "reward"], Depth.DEEP, only=["scores"])} == {"ok"}
    path = copy(sound, "reward", tmp_path)
    setting("score.weight", slice(None), 0)(path)
    assert next(one.status for one in examine([path], Depth.DEEP, only=["scores"])) == "problem"


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair(sound, tmp_path, change, kind="policy"):
    save_random(tmp_path / "other", 5, "reward" if kind == "reward" else "causal")
    change(tmp_path / "other")
    return {
        one.name: one for one in examine([sound / "policy", tmp_path / "other"], skip=SLOW) if " and " in one.subject
    }


def test_models_that_fit_can_be_merged_and_can_teach(sound, tmp_path):
    found = pair(sound, tmp_path, lambda path: None)
    assert {name: one.status for name, one in found.items()} == dict.fromkeys(
        ("mergeable", "teachable", "same-weights"), "ok"
    )


@pytest.mark.parametrize(
    ("change", "merging", "teaching"),
    [
        (config(attn_logit_softcapping=30.0), "no, attn_logit_softcapping is 50.0 and 30.0", "yes"),
        (config(sliding_window=16), "no, sliding_window", "yes"),
        (tokenizer(exchanged_turn_tokens), "no, their tokenizers differ", "no, their tokenizers differ"),
        (in_bf16, "yes; dtypes differ", "yes"),
        (template(" | trim", ""), "yes; chat templates differ", "no, their chat templates differ"),
        (weights(missing_tensor), "no, only one has model.layers.1.mlp.up_proj.weight", "yes"),
    ],
)
def test_why_two_models_do_not_fit(sound, tmp_path, change, merging, teaching):
    found = pair(sound, tmp_path, change)
    assert merging in found["mergeable"].message
    assert teaching in found["teachable"].message


def test_a_reward_model_neither_merges_with_a_policy_nor_teaches_it(sound, tmp_path):
    found = pair(sound, tmp_path, lambda path: None, kind="reward")
    assert found["mergeable"].status == found["teachable"].status == "problem"


def test_the_same_weights_under_two_names(sound, tmp_path):
    copy(sound, "policy", tmp_path)
    found = list(examine([sound / "policy", tmp_path / "policy"], only=["same-weights"]))
    assert [one.status for one in found] == ["warning"]


# --- fix --------------------------------------------------------------------------------------------------------------

MECHANICAL = {
    "generation config": remove("generation_config.json"),
    "stops": generation(eos_token_id=1),
    "max_length": generation(max_length=20),
    "template": template("<end_of_turn>\n", "<end_of_turn>"),
    "no post-processor": tokenizer(without_post_processor),
    "doubled bos": tokenizer(doubled_bos),
    "pad": tokenizer_settings(pad_token="<eos>"),
    "length": tokenizer_settings(model_max_length=512),
    "format": no_format,
    "index": lambda path: sharded(path, index=False),
    "total size": lambda path: sharded(path, total=7),
}


def tensors_of(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MECHANICAL)
def test_what_is_mechanical_is_put_right_in_a_copy(sound, tmp_path, name):
    path = copy(sound, "policy", tmp_path)
    MECHANICAL[name](path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    done = repair(path, tmp_path / "fixed")
    assert done.changed
    assert [one for one in examine([tmp_path / "fixed"], skip=SLOW) if one.status != "ok"] == []
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    left, right = tensors_of(path), tensors_of(tmp_path / "fixed")
    assert left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)
    if name != "format":
        weight = next(path.glob("*.safetensors"))
        assert (tmp_path / "fixed" / weight.name).stat().st_ino == weight.stat().st_ino


def test_nothing_is_changed_in_a_sound_model_and_weights_are_not_put_right(sound, tmp_path):
    assert repair(sound / "policy", tmp_path / "fixed").changed == []
    path = copy(sound, "policy", tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="not a model whose weights can be read"):
        repair(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_machine_is_checked_and_the_versions_are_those_of_the_constraints():
    found = {one.name: one for one in examine([])}
    assert set(found) == set(MACHINE_CHECKS) and {one.subject for one in found.values()} == {"machine"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    assert {name: pinned[name] for name in TESTED} == TESTED


def test_a_token_is_named_and_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    (found,) = examine([], only=["hub"])
    assert "token found" in found.message and "hf_planted" not in str(found)


def test_exit_codes_and_mistakes(sound, tmp_path):
    path = copy(sound, "policy", tmp_path)
    generation(max_length=20)(path)
    assert gemma2("doctor", path, "--quick")[0] == 0
    code, out, _ = gemma2("doctor", path, "--quick", "--strict", "--only", "stops")
    assert code == 1 and "warning" in out and "max_length 20" in out
    with pytest.raises(UsageError, match="did you mean 'stops'"):
        list(examine([path], only=["stop"]))
    with pytest.raises(InputError, match="does not exist"):
        list(examine([tmp_path / "nothing"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        list(examine([tmp_path / "empty"]))
    assert len(check_names()) == len(MODEL_CHECKS) + len(MACHINE_CHECKS) + 3
