"""Samples from vLLM: TRL's own VLLMGeneration over a stand-in for the engine, in this process and at a server."""

import inspect
import json
import os
import sys
import types

import fake_vllm
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from trl.generation import vllm_generation as trl_vllm
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.core.progress import SILENT
from gemma2.core.ranks import Ranks
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.models.sampler import SamplingParams, sample
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.rl import rlhf, vllm
from gemma2.posttrain.rl.rlhf import run_rlhf
from gemma2.posttrain.rl.vllm import VllmSampler
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import RlhfConfig, VllmFields
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

PROMPTS = [[2, 9, 8], [2, 5, 7, 11]]
N, LIMIT, TEMPERATURE = 3, 6, 0.8
URL = "http://localhost:8000"


class Drawing(VllmFields):
    """The fields of the RL stage that the sampler reads."""

    engine: str = "vllm"
    prompts_per_step: int = 2
    n: int = N
    max_new_tokens: int = LIMIT
    temperature: float = TEMPERATURE
    vllm_seeds: str = "request"


SERVER = Drawing(vllm_mode="server", vllm_server_url=URL)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """An untrained policy that draws the stop token often."""
    place = tmp_path_factory.mktemp("policy")
    model = random_model(4)
    with torch.no_grad():
        model.model.embed_tokens.weight[107] *= 6
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def engine(monkeypatch, model_dir, tmp_path):
    """The stand-in where TRL looks for vLLM, and a device that passes for a GPU."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(trl_vllm, "LLM", fake_vllm.LLM, raising=False)
    monkeypatch.setattr(trl_vllm, "SamplingParams", fake_vllm.SamplingParams, raising=False)
    monkeypatch.setattr(trl_vllm, "VLLMClient", fake_vllm.Client)
    monkeypatch.setattr(fake_vllm.Client, "model", str(model_dir))
    for module in (trl_vllm, vllm):
        monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in vllm.LAUNCHER:  # TRL sets them for good
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for calls in (fake_vllm.LLM.calls, fake_vllm.LLM.made, fake_vllm.Client.made):
        calls.clear()
    shown = types.SimpleNamespace(type="cuda")
    names = ("num_processes", "process_index", "local_process_index", "is_main_process", "wait_for_everyone", "state")
    return types.SimpleNamespace(device=shown, **{name: getattr(accelerator, name) for name in names})


def started(model_dir, engine, config=None, seed=0, ranks=None, policy=None):
    policy = policy if policy is not None else load_policy(model_dir)[0]
    chat = ChatFormat(tiny_tokenizer(), policy.generation_config)
    generator = torch.Generator().manual_seed(seed)
    return VllmSampler.start(config or Drawing(), policy, engine, chat, generator, 4, ranks or Ranks())


def drawn(sampler, n=N):
    sampler.sync()
    return sampler.draw(PROMPTS, n)


# --- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Drawing(), SERVER], ids=["colocate", "server"])
def test_every_completion_is_drawn_with_a_seed_of_its_own_from_the_runs_generator(model_dir, engine, config):
    sampler = started(model_dir, engine, config, seed=7)
    found = drawn(sampler)
    first = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(7)))
    stops = sampler.stop_ids
    for slot, (ids, truncated) in enumerate(zip(found.ids, found.truncated, strict=True)):
        generator = torch.Generator().manual_seed(first + slot)
        params = SamplingParams(LIMIT, TEMPERATURE)
        alone = sample(sampler.policy, [PROMPTS[slot // N]], params, sorted(stops), 0, generator)
        assert (ids, truncated) == (alone.ids[0], alone.truncated[0])
        assert (ids[-1] in stops) != truncated
        assert len(ids) == LIMIT or not truncated
    assert found.prompt_index == [0, 0, 0, 1, 1, 1]
    assert {False, True} == set(found.truncated + sampler.draw(PROMPTS, 8).truncated), "both kinds are met"
    assert len({tuple(ids) for ids in found.ids[:N]}) > 1, "the samples of a prompt differ"


def test_a_completion_is_truncated_when_it_ends_in_no_stop_token(model_dir, engine, monkeypatch):
    sampler = started(model_dir, engine)
    sampler.sync()
    # A stop token; one in the last place; none at the limit; none before it (the model's context was full); <eos>.
    given = [[5, 107], [5, 6, 7, 8, 9, 107], [5, 6, 7, 8, 9, 10], [5, 6], [107, 1], [1]]
    monkeypatch.setattr(sampler.generation, "generate", lambda **_: (None, given, None, None))
    assert sampler.draw(PROMPTS, N).truncated == [False, False, True, True, False, False]


def test_log_probs_are_those_of_our_own_forward_and_the_difference_is_shown(model_dir, engine):
    sampler = started(model_dir, engine)
    fake_vllm.LLM.made[-1].off_by = 0.03
    found = drawn(sampler)
    pairs = [PROMPTS[i] for i in found.prompt_index]
    ours = token_logps(sampler.policy, pairs, found.ids, 4, TEMPERATURE)
    assert found.logps == [values.tolist() for values in ours]
    assert sampler.mismatch == pytest.approx(0.03, abs=1e-5)


def test_a_server_tells_no_log_probs_that_could_be_compared(model_dir, engine):
    sampler = started(model_dir, engine, SERVER)
    drawn(sampler)
    assert sampler.mismatch is None


def test_draws_go_on_and_repeat_with_the_generators_state(model_dir, engine):
    sampler = started(model_dir, engine)
    state = sampler.generator.get_state()
    first, second = drawn(sampler), drawn(sampler)
    assert first.ids != second.ids
    assert drawn(started(model_dir, engine, seed=1)).ids != first.ids
    resumed = started(model_dir, engine, seed=5)
    resumed.generator.set_state(state)
    assert drawn(resumed).ids == first.ids
    assert drawn(resumed).ids == second.ids


def test_one_seed_for_a_batch_leaves_requests_without_and_torchs_numbers_as_they_were(model_dir, engine):
    settings = Drawing(vllm_seeds="batch")
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    first, same, other = (drawn(started(model_dir, engine, settings, seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(4), expected)
    assert [params.seed for params in fake_vllm.LLM.calls[-1]] == [None] * len(first.ids)
    assert first.ids == same.ids != other.ids
    assert len({tuple(ids) for ids in first.ids[:N]}) > 1, "the samples of a prompt differ"


def test_a_process_skips_the_seeds_of_those_before_it(model_dir, engine):
    seeds = []
    for rank in (0, 1):
        drawn(started(model_dir, engine, ranks=Ranks(rank, 2)))
        seeds.append([params.seed for params in fake_vllm.LLM.calls[-1]])
    assert seeds[0] + seeds[1] == list(range(seeds[0][0], seeds[0][0] + 4 * N))


def test_the_processes_of_one_copy_share_their_seeds(model_dir, engine):
    sampler = started(model_dir, engine)
    sampler.generation.tensor_parallel_size = 2
    firsts = []
    for rank in range(4):
        sampler.ranks = Ranks(rank, 4)
        firsts.append(sampler._first_slot(6))
    assert firsts == [0, 0, 12, 12]


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Drawing(), SERVER], ids=["colocate", "server"])
def test_sync_gives_vllm_the_weights_of_the_policy_once_each_tied_ones_included(model_dir, engine, config):
    sampler = started(model_dir, engine, config)
    llm = fake_vllm.LLM.made[-1]
    with torch.no_grad():
        for parameter in sampler.policy.parameters():
            parameter += 0.01
    sampler.sync()
    theirs = dict(llm.model.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in sampler.policy.named_parameters())
    assert sorted(llm.loaded) == sorted(theirs)
    assert llm.resets == 1, "keys and values of the old weights are dropped"


def test_vllm_on_other_weights_than_the_policy_stops_the_run(model_dir, engine):
    sampler = started(model_dir, engine)
    sampler.sync()
    with torch.no_grad():
        sampler.policy.model.embed_tokens.weight *= 3
    with pytest.raises(GuardStop, match="nats per token"):
        sampler.draw(PROMPTS, N)
    sampler.sync()
    sampler.draw(PROMPTS, N)
    assert sampler.mismatch == pytest.approx(0, abs=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_adapters_reach_vllm_as_products_and_leave_the_frozen_weights_alone(model_dir, engine):
    from peft import LoraConfig, get_peft_model

    policy, _ = load_policy(model_dir)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    adapted = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    sampler = started(model_dir, engine, policy=policy)
    drawn(sampler)
    assert sampler.mismatch == pytest.approx(0, abs=1e-5)
    llm = fake_vllm.LLM.made[-1]
    assert sorted(llm.loaded) == sorted(before)
    frozen = {name.replace(".base_layer", ""): p for name, p in policy.named_parameters() if ".lora_" not in name}
    assert all(torch.equal(frozen[name], tensor) for name, tensor in before.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (dict(llm.model.named_parameters())[name] - before[name]).abs().max() > 1e-3


def test_a_draw_before_the_first_sync_is_a_bug(model_dir, engine):
    with pytest.raises(RuntimeError, match="sync"):
        started(model_dir, engine).draw(PROMPTS, N)


# --- the command ----------------------------------------------------------------------------------------------------


def evens(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def rl(model_dir, prompts, out, resume=False, progress=None, **fields):
    common = {"policy": model_dir, "prompts": prompts, "heldout": prompts, "reward_fn": f"{__name__}:evens"}
    sizes = {"steps": 4, "prompts_per_step": 2, "n": N, "max_new_tokens": LIMIT, "save_every": 1, "eval_prompts": 2}
    learning = {"learning_rate": 1e-2, "warmup_steps": 0, "mu": 0.3, "temperature": TEMPERATURE}
    config = RlhfConfig(engine="vllm", **(common | sizes | learning | fields))
    run_rlhf(config, RunOptions(out, resume), progress or SILENT)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_rl_draws_from_vllm_and_a_resumed_run_goes_on_with_its_weights_and_seeds(
    model_dir, engine, tmp_path, monkeypatch, interrupting
):
    for module in (vllm, rlhf):
        monkeypatch.setattr(module, "check_usable", lambda *arguments: None)
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": text}) for text in ("What is 2 + 3?", "Say hello.", "And?")]
    prompts.write_text("\n".join(rows))
    whole = rl(model_dir, prompts, tmp_path / "whole")
    steps = [row for row in whole if "kind" not in row]
    assert [abs(row["vllm_mismatch"]) < 1e-5 for row in steps] == [True] * 4, "vLLM has the weights of every step"
    assert abs(steps[0]["kl_anchor"]) == 0, "equal weights, one forward: exactly 0"
    assert abs(steps[-1]["kl_anchor"]) > 1e-4
    with pytest.raises(KeyboardInterrupt):
        rl(model_dir, prompts, tmp_path / "cut", progress=interrupting(2))
    assert rl(model_dir, prompts, tmp_path / "cut", resume=True) == whole
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- starting -------------------------------------------------------------------------------------------------------


def test_the_options_reach_vllm_by_trls_names(model_dir, engine):
    sampler = started(model_dir, engine, Drawing(vllm_memory=0.4))
    kwargs = fake_vllm.LLM.made[-1].kwargs
    wanted = {"gpu_memory_utilization": 0.4, "tensor_parallel_size": 1, "max_num_seqs": 6, "model_impl": "vllm"}
    assert wanted.items() <= kwargs.items()
    assert kwargs["logprobs_mode"] == "processed_logprobs", "what `mismatch` compares is at the sampling temperature"
    assert set(sampler.generation.generation_kwargs) == {"stop_token_ids"}
    drawn(sampler)
    params = fake_vllm.LLM.calls[-1][0]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (TEMPERATURE, 1.0, 0, 0.0)
    assert set(params.stop_token_ids) == {1, 107}
    assert os.environ["LOCAL_RANK"] == "0", "TRL's doing"
    sampler.close()
    assert sampler.generation.llm is None
    assert not os.environ.keys() & set(vllm.LAUNCHER), "the next run of this process is no child of a launcher"


def test_a_server_is_joined_and_left(model_dir, engine):
    sampler = started(model_dir, engine, SERVER)
    (client,) = fake_vllm.Client.made
    assert (client.base_url, client.joined) == (URL, engine.device)
    sampler.close()
    assert client.joined is None


def test_what_cannot_start_is_one_line(model_dir, engine, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=r"--vllm-tensor-parallel 2 does not divide the 3 processes"):
        started(model_dir, engine, Drawing(vllm_tensor_parallel=2), ranks=Ranks(0, 3))
    policy = load_policy(model_dir)[0]
    policy.name_or_path = str(tmp_path)
    with pytest.raises(InputError, match=r"--engine vllm does not start: .* is no model"):
        started(model_dir, engine, policy=policy)

    def refuse(self, device=0):
        raise RuntimeError("The vLLM server\nhas no weight-transfer engine")

    monkeypatch.setattr(fake_vllm.Client, "init_communicator", refuse)
    with pytest.raises(InputError, match="The vLLM server has no weight-transfer engine"):
        started(model_dir, engine, SERVER)
    with pytest.raises(UsageError, match="needs a GPU"):
        started(model_dir, Accelerator(cpu=True))
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'gemma2\[vllm\]'"):
        started(model_dir, engine)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"engine": "transformers", "vllm_mode": "server", "vllm_server_url": URL}, "are for --engine vllm"),
        ({"vllm_mode": "server"}, "go together"),
        ({"vllm_server_url": URL}, "go together"),
        ({"vllm_mode": "server", "vllm_server_url": URL, "vllm_tensor_parallel": 2}, "are for colocate"),
        ({"vllm_mode": "server", "vllm_server_url": URL, "vllm_max_model_len": 64}, "are for colocate"),
        ({"vllm_mode": "server", "vllm_server_url": URL, "vllm_sleep_mode": True}, "are for colocate"),
        ({"engine": "transformers", "vllm_sleep_mode": True}, "are for --engine vllm"),
        ({"vllm_mode": "server", "vllm_server_url": "http://me:secret@host"}, "--vllm-server-url holds credentials"),
        ({"vllm_mode": "server", "vllm_server_url": "host:8000"}, "not an http address"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        VllmFields(**({"engine": "vllm"} | fields))


def test_vllm_sleeps_between_draws_and_gets_the_weights_again(model_dir, engine):
    awake = drawn(started(model_dir, engine, seed=3))
    sampler = started(model_dir, engine, Drawing(vllm_sleep_mode=True, vllm_max_model_len=64), seed=3)
    llm = fake_vllm.LLM.made[-1]
    assert (llm.kwargs["max_model_len"], llm.asleep) == (64, {"weights", "kv_cache"})
    assert drawn(sampler).ids == awake.ids
    assert llm.asleep == {"weights", "kv_cache"}
    assert sampler.draw(PROMPTS, N).ids  # an evaluation, without a step in between: the weights went there again
    assert llm.slept == 3
    assert sampler.mismatch == pytest.approx(0, abs=1e-5)


def test_a_context_without_room_for_a_prompt_is_refused(model_dir):
    paths = {"policy": model_dir, "prompts": model_dir, "reward_fn": "a:b"}
    with pytest.raises(ValueError, match="leaves no room for a prompt before max_new_tokens 64"):
        RlhfConfig(engine="vllm", vllm_max_model_len=64, max_new_tokens=64, **paths)
    RlhfConfig(engine="vllm", vllm_max_model_len=65, max_new_tokens=64, **paths)


class Lines:
    """A progress that keeps its notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_vllm_without_the_soft_cap_is_refused_before_a_model_is_loaded(model_dir, engine, monkeypatch):
    def without_cap(network):
        for layer in network.model.layers:
            layer.self_attn.attn_logit_softcapping = None

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(fake_vllm.LLM, "drops", staticmethod(without_cap))
    config = RlhfConfig(policy=model_dir, prompts=model_dir, reward_fn="a:b", engine="vllm")
    with pytest.raises(InputError, match="computes this model without the soft cap of attention"):
        vllm.compare_attention(config, Ranks(), Lines())
    assert os.environ["WORLD_SIZE"] == "2"
    monkeypatch.setattr(fake_vllm.LLM, "drops", staticmethod(lambda network: None))
    heard = Lines()
    vllm.compare_attention(config, Ranks(), heard)
    assert heard.notes == ["comparing the attention of vLLM 0.10.2 with eager attention, once"]


def test_the_attention_of_a_server_is_not_compared_and_this_is_said(model_dir, engine):
    heard = Lines()
    where = {"engine": "vllm", "vllm_mode": "server", "vllm_server_url": URL}
    vllm.compare_attention(RlhfConfig(policy=model_dir, prompts=model_dir, reward_fn="a:b", **where), Ranks(), heard)
    assert fake_vllm.LLM.made == []
    assert "not compared here" in heard.notes[0]


# --- the contract with TRL 1.16 -------------------------------------------------------------------------------------


def test_trl_has_what_the_sampler_calls():
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[:4] == [
        *("self", "prompts", "images", "num_generations"),
    ]
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    parameters = inspect.signature(VLLMGeneration.__init__).parameters
    assert {
        *("model", "accelerator", "processing_class", "mode", "server_base_url", "tensor_parallel_size"),
        *("gpu_memory_utilization", "max_num_seqs", "model_impl", "temperature", "max_completion_length", "logprobs"),
        "generation_kwargs",
    } <= parameters.keys()
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "enable_sleep_mode": False}
    assert {name: parameters[name].default for name in neutral} == neutral


@pytest.mark.parametrize(
    "name",
    ["__init__", "init_communicator", "close_communicator", "generate", "update_named_params", "reset_prefix_cache"],
)
def test_the_stand_in_for_the_client_has_trls_signatures(name):
    ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (fake_vllm.Client, VLLMClient))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
