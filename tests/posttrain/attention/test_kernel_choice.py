"""What is asked for runs or is refused in one line; what `auto` takes is said and recorded."""

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gemma2.core.errors import UsageError
from gemma2.core.progress import SILENT
from gemma2.core.ranks import Ranks
from gemma2.posttrain.attention import choice
from gemma2.posttrain.attention.choice import chosen_kernel, drawing_kernel, kernels_in, settle_attention
from gemma2.posttrain.attention.kernel_check import KernelCheck, ProbeDistances
from gemma2.posttrain.attention.kernels import installed_kernels, refuse_kernel
from gemma2.posttrain.models import loading
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.scorer import masked_states, token_logps
from gemma2.posttrain.rl import setup
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.tiny.networks import save_random, tiny_tokenizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CAPPED = {"model_type": "gemma2", "attn_logit_softcapping": 50.0}
PLAIN = {"model_type": "llama"}
LIMIT = ProbeDistances(0.1, 0.3)


class Heard:
    """A progress that keeps its lines."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture(autouse=True)
def no_decisions(monkeypatch):
    monkeypatch.setattr(choice, "_choices", {})


@pytest.fixture
def model(tmp_path):
    return save_random(tmp_path / "model")


@pytest.fixture
def checks(monkeypatch):
    """Stands in for the comparison: its outcome is set, and every call is kept."""
    seen = []
    seen_off = [ProbeDistances(0.01, 0.02)]

    def compared(settings, kernel, precision, device, *, learns, packed=False):
        seen.append((kernel, precision, learns, packed))
        if isinstance(seen_off[0], Exception):
            raise seen_off[0]
        return KernelCheck(kernel, precision, "packed", seen_off[0], LIMIT, learns, "without the soft cap")

    monkeypatch.setattr(choice, "check_kernel", compared)
    compared.seen, compared.off = seen, seen_off
    return compared


# --- auto -------------------------------------------------------------------------------------------------------------


def test_auto_on_a_cpu_is_eager_and_compares_nothing(model, checks):
    heard = Heard()
    found = settle_attention("auto", [model], heard, device=CPU, learns=True)
    assert found == {"asked": "auto", "models": {str(model): {"kernel": "eager"}}}
    assert kernels_in(found) == "eager"
    assert (checks.seen, heard.notes, heard.warnings) == ([], [], [])


def test_auto_on_an_accelerator_takes_flex_and_says_by_how_much_it_is_off(model, checks):
    heard = Heard()
    found = settle_attention("auto", [model], heard, device=CUDA, learns=True)
    assert found["models"][str(model)]["kernel"] == "flex_attention"
    assert [one["states"] for one in found["models"][str(model)]["checks"]] == [0.01, 0.01]
    (line,) = heard.notes
    assert line.startswith("attention: flex_attention, off eager attention by 0.01 of the states' size (limit 0.1), ")
    assert checks.seen == [("flex_attention", "autocast", True, False), ("flex_attention", "float32", False, False)]


def test_models_that_are_read_are_compared_in_their_precision_and_without_gradients(model, checks):
    settle_attention("auto", [model], dtype=torch.bfloat16, device=CUDA)
    assert checks.seen == [("flex_attention", "bfloat16", False, False)]


def test_auto_falls_back_to_eager_with_the_figures(model, checks):
    checks.off[0] = ProbeDistances(0.24, 3.0)
    heard = Heard()
    found = settle_attention("auto", [model], heard, device=CUDA)
    (line,) = heard.warnings
    assert line == (
        "attention: eager; flex_attention is off eager attention by 0.24 of the states' size (limit 0.1) in fp32 on "
        "packed rows: without the soft cap"
    )
    record = found["models"][str(model)]
    assert (record["kernel"], record["reason"], record["checks"][0]["states"]) == ("eager", line, 0.24)
    assert chosen_kernel("auto", model, torch.float32, CUDA) == "eager"


def test_auto_falls_back_where_the_kernel_cannot_run_and_repeats_the_cause(model, checks):
    checks.off[0] = RuntimeError("out of\n shared memory")
    heard = Heard()
    settle_attention("auto", [model], heard, device=CUDA)
    assert heard.warnings == ["attention: eager; flex_attention cannot run here: out of shared memory"]
    heard = Heard()
    settle_attention("auto", [model], heard, device=torch.device("meta"))
    assert heard.warnings == ["attention: eager; --attention flex_attention does not run on meta"]


def test_a_decision_is_made_once_for_an_architecture(model, tmp_path, checks):
    same, other = save_random(tmp_path / "b", 5), save_random(tmp_path / "c", head_dim=4)
    settle_attention("auto", [model], device=CUDA, learns=True)
    assert chosen_kernel("auto", same, torch.bfloat16, CUDA) == "flex_attention"
    assert len(checks.seen) == 2
    assert chosen_kernel("auto", other, torch.bfloat16, CUDA) == "flex_attention"
    assert checks.seen[2:] == [("flex_attention", "bfloat16", False, False)]


class Job(Ranks):
    """A rank of two; the other one has decided as `other` says."""

    other = ("eager", "attention: eager; flex_attention cannot run here: no compiler")
    exchanged: ClassVar[list] = []

    def gather(self, value):
        self.exchanged.append(value)
        return [value, [self.other] * len(value)] if self.rank == 0 else [[self.other] * len(value), value]


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_are_all_eager_where_one_of_them_has_to_be(model, tmp_path, checks, monkeypatch, rank):
    monkeypatch.setattr(choice, "_met", lambda: Job(rank, 2))
    heard = Heard()
    models = [model, save_random(tmp_path / "other", head_dim=4)]
    found = settle_attention("auto", models, heard, device=CUDA, learns=True)
    assert kernels_in(found) == "eager"
    reason = f"{Job.other[1]} (rank {1 - rank}, so on all)"
    assert heard.warnings == [reason] and heard.notes == []
    assert [one["reason"] for one in found["models"].values()] == [reason] * 2
    assert chosen_kernel("auto", model, torch.float32, CUDA) == "eager"  # what is loaded later


def test_processes_that_decide_alike_keep_their_choice_and_exchange_nothing_where_there_is_nothing_to_decide(
    model, checks, monkeypatch
):
    monkeypatch.setattr(choice, "_met", lambda: Job(0, 2))
    monkeypatch.setattr(Job, "other", ("flex_attention", ""))
    monkeypatch.setattr(Job, "exchanged", [])
    assert kernels_in(settle_attention("flex_attention", [model], device=CUDA)) == "flex_attention"
    assert kernels_in(settle_attention("auto", [model], device=CPU)) == "eager"
    assert Job.exchanged == []
    assert kernels_in(settle_attention("auto", [model], device=CUDA)) == "flex_attention"
    assert Job.exchanged == [[("flex_attention", "")]]


def test_packing_is_refused_where_auto_is_eager(model):
    with pytest.raises(UsageError, match=r"packing with eager attention .*; drop --packing"):
        settle_attention("auto", [model], device=CPU, learns=True, packed=True)


# --- a kernel that is asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "settings", "device", "options", "said"),
    [
        ("sdpa", CAPPED, CUDA, {}, "sdpa has no soft cap, and this model's attention has one"),
        ("flex_attention", CAPPED, CPU, {}, "flex_attention needs an accelerator"),
        ("flash_attention_2", CAPPED, CPU, {}, "flash_attention_2 needs an accelerator"),
        ("flash_attention_3", CAPPED, torch.device("hpu"), {}, "flash_attention_3 does not run on hpu"),
        ("flash_attention_2", CAPPED, CUDA, {}, "needs the package flash-attn; pip install flash-attn"),
        ("flash_attention_3", CAPPED, CUDA, {}, "needs the package flash-attn-3; pip install flash-attn-3"),
        ("flex_attention", PLAIN | {"attention_dropout": 0.1}, CUDA, {"learns": True}, "has no dropout"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused(kernel, settings, device, options, said):
    with pytest.raises(UsageError, match=said):
        refuse_kernel(kernel, settings, device, **{"learns": False} | options)


def test_flash_attention_and_fp32_do_not_go_together(monkeypatch):
    from gemma2.posttrain.attention import kernels

    monkeypatch.setitem(kernels.FOUND, "flash_attention_2", lambda: True)
    refuse_kernel("flash_attention_2", CAPPED, CUDA, learns=True)
    with pytest.raises(UsageError, match="half precision only; give --dtype bfloat16, or use --attention eager"):
        refuse_kernel("flash_attention_2", CAPPED, CUDA, learns=False, wide="give --dtype bfloat16")
    assert installed_kernels(CUDA) == ["flex_attention", "flash_attention_2"]
    assert installed_kernels(CPU) == []


def test_kernels_that_fit_are_not_refused():
    for kernel, settings, device in [("eager", CAPPED, CPU), ("sdpa", PLAIN, CPU), ("flex_attention", CAPPED, CUDA)]:
        refuse_kernel(kernel, settings, device, learns=True)


def test_flash_attention_is_compared_under_autocast_alone(model, checks, monkeypatch):
    from gemma2.posttrain.attention import kernels

    monkeypatch.setitem(kernels.FOUND, "flash_attention_2", lambda: True)
    settle_attention("flash_attention_2", [model], device=CUDA, learns=True, packed=True)
    assert checks.seen == [("flash_attention_2", "autocast", True, True)]


@pytest.mark.parametrize(
    ("trainer", "dtype", "fix"),
    [
        ({}, "auto", ""),
        ({}, "bfloat16", ""),
        ({}, "float32", "give --dtype bfloat16"),
        ({"bf16": False}, "bfloat16", "leave trainer.bf16 out"),
        ({"bf16": False, "fp16": True}, "bfloat16", ""),
    ],
)
def test_flash_attention_is_refused_where_a_training_computes_in_fp32(model, checks, monkeypatch, trainer, dtype, fix):
    from gemma2.posttrain.attention import kernels
    from gemma2.posttrain.models import precision

    monkeypatch.setitem(kernels.FOUND, "flash_attention_2", lambda: True)
    monkeypatch.setattr(precision, "default_device", lambda: CUDA)

    def settled():
        wide = precision.widening(trainer, dtype)
        return settle_attention("flash_attention_2", [model], device=CUDA, learns=True, wide=wide)

    if not fix:
        assert kernels_in(settled()) == "flash_attention_2"
        return
    with pytest.raises(UsageError, match=f"half precision only; {fix}, or use --attention eager"):
        settled()
    assert checks.seen == []


def test_a_kernel_that_trains_in_fp32_is_compared_with_its_gradients_in_both_precisions(model, checks):
    settle_attention("flex_attention", [model], device=CUDA, learns=True, wide="leave trainer.bf16 out")
    assert checks.seen == [("flex_attention", "autocast", True, False), ("flex_attention", "float32", True, False)]


WIDE = {"trainer": {"bf16": False}}
BF16, DTYPE = "leave trainer.bf16 out", "give --dtype bfloat16"


@pytest.mark.parametrize(
    ("name", "models", "data", "options", "fix"),
    [
        ("sft", ["model"], "data", WIDE, BF16),
        ("reward", ["model"], "data", WIDE, BF16),
        ("distill", ["model", "teacher"], "prompts", WIDE, BF16),
        ("rlhf", ["policy"], "prompts", {"reward_fn": ("m:f",), **WIDE}, BF16),
        ("rlhf", ["policy"], "prompts", {"reward_fn": ("m:f",), "dtype": "float32"}, DTYPE),
        ("distill cache", ["teacher"], "data", {"teacher_dtype": "float32"}, "give --teacher-dtype bfloat16"),
        ("reward probe", ["model"], "data", {}, "use --attention flex_attention"),
    ],
)
def test_commands_that_compute_in_fp32_refuse_flash_attention_before_they_load_a_model(
    model, checks, monkeypatch, tmp_path, name, models, data, options, fix
):
    from gemma2.posttrain.attention import kernels
    from gemma2.posttrain.runs.commands import COMMANDS

    rows = tmp_path / "rows.jsonl"
    row = {"response": "b", "chosen": "b", "rejected": "c"}
    rows.write_text("".join(json.dumps({"prompt": f"a{n}"} | row) + "\n" for n in range(20)), encoding="utf-8")
    command = COMMANDS[name]
    module = import_module(f"gemma2.posttrain.{command.module}")
    monkeypatch.setitem(kernels.FOUND, "flash_attention_2", lambda: True)
    monkeypatch.setattr(module, "default_device", lambda: CUDA)
    given = {data: (rows,) if name == "sft" else rows} | dict.fromkeys(models, model)
    config = command.schema(attention="flash_attention_2", **given, **options)
    with pytest.raises(UsageError, match=f"half precision only; {fix}, or use --attention eager"):
        getattr(module, command.function)(config, RunOptions(tmp_path / "out"), SILENT)
    assert checks.seen == []


def test_a_kernel_that_was_asked_for_and_is_wrong_ends_the_command(model, checks):
    checks.off[0] = ProbeDistances(0.24, 3.0)
    with pytest.raises(UsageError, match=r"computes other attention .*: without the soft cap; use --attention eager"):
        settle_attention("flex_attention", [model], device=CUDA)
    assert chosen_kernel("eager", model, torch.float32, CUDA) == "eager"  # its advice


def test_a_kernel_that_was_asked_for_and_breaks_is_not_replaced(model, checks):
    checks.off[0] = RuntimeError("no kernel image\nfor sm_70")
    said = "--attention flex_attention cannot run here: no kernel image for sm_70; use --attention eager"
    with pytest.raises(UsageError, match=said):
        settle_attention("flex_attention", [model], device=CUDA)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_model_without_a_cap_is_scored_by_sdpa_as_by_eager(llama):
    """The comparison runs for real here, on the CPU."""
    eager, sdpa = load_policy(llama, attention="eager")[0], load_policy(llama, attention="sdpa")[0]
    assert sdpa.config._attn_implementation == "sdpa"
    prompts, answers = [[2, 5, 6], [2, 9]], [[7, 8], [10, 11, 12]]
    for a, b in zip(token_logps(eager, prompts, answers), token_logps(sdpa, prompts, answers), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_gemma_2_is_not_loaded_with_sdpa(model):
    with pytest.raises(UsageError, match=r"no soft cap, .*attn_logit_softcapping 50.0.*; use --attention eager"):
        load_policy(model, attention="sdpa")


def test_flex_attention_scores_as_eager_does(model, uncompiled_flex):
    """The scorer hands it no masks: rows are padded on the right."""
    eager = load_policy(model)[0]
    flex = load_policy(model)[0]
    flex.config._attn_implementation = "flex_attention"
    prompts, answers = [[2, 5, 6], [2, 9]], [[7, 8] * 9, [10, 11, 12]]  # longer than the window of 8
    with torch.no_grad():
        for a, b in zip(token_logps(eager, prompts, answers), token_logps(flex, prompts, answers), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_flash_attention_reads_fp32_weights_under_autocast(model):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    seen = []

    def attend(module, query, key, value, *arguments, **options):
        seen.append((torch.is_autocast_enabled("cpu"), value.dtype))
        return eager_attention_forward(module, query, key, value.to(query.dtype), *arguments, **options)

    AttentionInterface.register("flash_stand_in", attend)
    AttentionMaskInterface.register("flash_stand_in", eager_mask)
    network = load_policy(model)[0]
    network.config._attn_implementation = "flash_stand_in"
    with torch.no_grad():
        masked_states(network, torch.tensor([[2, 5, 6]]))
        network.bfloat16()
        masked_states(network, torch.tensor([[2, 5, 6]]))
    assert seen == [(True, torch.bfloat16)] * 2 + [(False, torch.bfloat16)] * 2


def test_the_sampler_draws_in_eager_attention_or_sdpa():
    kernels = ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2")
    assert [drawing_kernel(asked) for asked in kernels] == ["eager", "eager", "sdpa", "eager", "eager"]


def test_records_are_json(model, checks):
    assert json.loads(json.dumps(settle_attention("auto", [model], device=CUDA, learns=True)))


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_reports_every_kernel_of_the_machine(model, checks, monkeypatch):
    from gemma2.posttrain.doctor.checks import attention_probe
    from gemma2.posttrain.doctor.checks.subject import Subject

    monkeypatch.setattr(attention_probe, "installed_kernels", lambda device: ["flex_attention"])
    monkeypatch.setattr(attention_probe, "check_kernel", checks)
    for off, status, words in (
        (ProbeDistances(0.01, 0.02), "ok", "flex_attention: off eager attention by 0.01"),
        (ProbeDistances(0.24, 3.0), "problem", "on packed rows: without the soft cap"),
        (RuntimeError("no\ncompiler"), "warning", "flex_attention cannot run here: no compiler"),
    ):
        checks.off[0] = off
        *own, found = attention_probe.probe_attention(Subject(model))
        assert len(own) == 2
        assert words in found.message
        assert (found.status, bool(found.fix)) == (status, status != "ok")
    assert checks.seen == [("flex_attention", "autocast", True, True)] * 3


def test_a_model_that_waits_on_the_host_has_the_kernel_of_where_it_computes(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        loading, "chosen_kernel", lambda asked_for, path, dtype, device: asked.append(device) or "eager"
    )
    loaded, _ = load_policy(model, device=CPU, attention="flex_attention", computes_on=CUDA)
    assert (asked, loaded.device) == ([CUDA], CPU)


def test_the_reference_of_rl_waits_on_the_host_and_has_the_kernel_of_the_policys_device(monkeypatch):
    loads = []

    def load(path, dtype, device, attention, computes_on):
        loads.append((device, computes_on))
        return torch.nn.Linear(1, 1), None

    monkeypatch.setattr(setup, "load_policy", load)
    monkeypatch.setattr(setup, "check_same_vocabulary", lambda *_: None)
    policy = SimpleNamespace(device=CUDA)
    for anchor in ("ema", "sft"):  # where the anchor is the SFT policy every step needs it
        config = SimpleNamespace(anchor=anchor, sft=Path("sft"), policy=Path("p"), dtype="auto", attention="auto")
        setup.reference_of(config, policy, starts_at_sft=False)
    assert loads == [(CPU, CUDA), (CUDA, CUDA)]
