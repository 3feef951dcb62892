"""Memory on several GPUs, by strategy: the table that was computed by hand when sharding was designed, row by row.

The table, in GB of 10^9 bytes a GPU of 80 GB: fp32 weights, gradients and Adam, an fp32 anchor, everything that is
frozen in bf16, all of it divided; one row of 2048 tokens with its logits whole in fp32; activation checkpointing;
attention without scores in memory; vLLM over at most 8 GPUs with a cache of 64 x 2048 tokens, asleep while training.
"""

from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma2.posttrain.planning import learning, reinforcing
from gemma2.posttrain.planning.memory import memory_of
from gemma2.posttrain.planning.parts import Bytes, MemoryPlace, MemoryPlan
from gemma2.posttrain.planning.shapes import SIZES, shape_of
from gemma2.posttrain.schemas import DistillConfig, RewardConfig, RlhfConfig, SftConfig
from gemma2.posttrain.schemas.config import Config

ROWS, TOKENS = Path("rows"), 2048
CARD = 80e9
CACHE = {"2b": 14, "9b": 45, "27b": 49}  # GB: keys and values of 64 x 2048 tokens in bf16
GPUS = (1, 8, 16)
# What a plan counts and the table does not.
RAISED = "the embedding's gradient is summed in fp32 before it is divided: two more bytes for each of its weights"
LAYERS = "a layer of the 27B, the next one and their gradients are whole in the backward pass"
WHOLE = "the student is whole, in bf16, on every GPU while it answers"
FREED = "there are no gradients while samples are drawn"
TABLE = {
    ("sft", "2b", "full"): (46, 10.9, 8.3),
    ("sft", "2b", "lora"): (9.7, 6.4, 6.0),
    ("sft", "9b", "full"): (None, 26, 17),
    ("sft", "9b", "lora"): (24.1, 9.8, 8.6),
    ("sft", "27b", "full"): (None, 65, LAYERS),
    ("sft", "27b", "lora"): (62, LAYERS, 14),
    ("distill", "2b", "9b"): (67, 15, 12),
    ("distill", "2b", "27b"): (None, 21, 15),
    ("distill", "9b", "27b"): (None, WHOLE, WHOLE),
    ("reward", "2b", ""): (44, RAISED, RAISED),
    ("reward", "9b", ""): (None, 24, 15),
    ("reward", "27b", ""): (None, 62, LAYERS),
    ("rlhf", "2b", "2b"): (FREED, 13.5, 9.6),
    ("rlhf", "2b", "dense"): (41, 8.0, 6.9),
    ("rlhf", "2b", "factors"): (33, 7.0, 6.4),
    ("rlhf", "9b", "9b"): (None, 39, 25),
    ("rlhf", "9b", "dense"): (None, 20, 15),
    ("rlhf", "9b", "factors"): (None, 16, 13),
    ("rlhf", "27b", "9b"): (None, 93, 55),
    ("rlhf", "27b", "dense"): (None, 38, 27),
    ("rlhf", "27b", "factors"): (None, 25, 21),
}
# Sums by hand for those rows: 16 P / n + what is frozen + 0.86 of the libraries + what is whole.
EXPECTED = {
    ("sft", "27b", "full"): (None, None, 27.2 + 0.9 + 4 * 1.18 + 10 * 0.57 + 2.5),
    ("sft", "27b", "lora"): (None, (54.5 + 1.8) / 8 + 0.9 + 2 * 1.18 + 4 * 0.57 + 2.1 + 3.5, None),
    ("reward", "27b", ""): (None, None, 27.2 + 0.9 + 2 * 1.18 + 10 * 0.57 + 2.5),
    ("distill", "9b", "27b"): (None, 13.9 + 6.8 + 0.9 + 18.5 + 2.5 + 1.7, 6.9 + 3.4 + 0.9 + 18.5 + 2.5 + 0.9),
    ("reward", "2b", ""): (None, 5.2 + 0.9 + 6 * 0.59, 2.6 + 0.9 + 6 * 0.59),
    ("rlhf", "2b", "2b"): (12 * 2.61 + 4 * 2.61 + 2 * 5.2 + 0.9 + 14 + 5.2 + 2, None, None),
}


def config_of(command: str, size: str, form: str, gpus: int) -> Config:
    model, step = Path(size), {"batch_size": 16, "micro_batch_size": 1}
    adapters = {"lora_rank": 16} if form in ("lora", "dense", "factors") else {}
    if command == "sft":
        found: Config = SftConfig(model=model, data=(ROWS,), max_length=TOKENS, **step, **adapters)
    elif command == "reward":  # a pair is two rows
        found = RewardConfig(model=model, data=ROWS, max_length=TOKENS // 2, **step)
    elif command == "distill":
        rows = {"prompts": ROWS, "data": ROWS, "max_length": TOKENS, "max_new_tokens": TOKENS - 512}
        found = DistillConfig(model=model, teacher=Path(form), **rows, **step)
    else:
        judge = {"27b": "9b"}.get(size, size)
        parallel = min(gpus, 8)
        held = (2 * SIZES[size].parameters / 1e9 + CACHE[size]) / parallel + 2
        engine = {"engine": "vllm", "vllm_tensor_parallel": parallel, "vllm_memory": min(held / 80, 0.99)}
        adapters |= {"lora_anchor": form} if adapters else {}
        lengths = {"max_new_tokens": TOKENS - 512, "micro_batch_size": 1}
        found = RlhfConfig(policy=model, prompts=ROWS, reward=(Path(judge),), **engine, **lengths, **adapters)
    return found.model_copy(update={"attention": "flex_attention"})


def planned(config: Config, gpus: int, sharded: bool = True) -> MemoryPlan:
    plan = memory_of(config, shape_of, MemoryPlace("accelerator", gpus, sharded, CARD))
    assert plan is not None
    return plan


@pytest.fixture
def whole_logits(monkeypatch):
    """The logits of a row whole, in fp32; the trainers make some at a time."""
    vocabulary = SIZES["2b"].vocabulary
    whole = lambda vocabulary, rows, learns, mixed: Bytes(4.0 * vocabulary * min(rows, TOKENS))  # noqa: E731
    for module in (learning, reinforcing):
        monkeypatch.setattr(module, "chunk_logits", whole)
    monkeypatch.setattr(learning, "CHUNK", TOKENS * vocabulary)
    monkeypatch.setattr(learning, "DIVERGENCE_COPIES", {"reverse-kl": 1})


@pytest.mark.parametrize("row", TABLE, ids="-".join)
def test_every_row_of_the_table_is_what_a_plan_counts(row, whole_logits):
    for column, gpus in enumerate(GPUS):
        said = TABLE[row][column]
        if said is None:
            continue  # more than a GPU has
        expected = EXPECTED[row][column] if isinstance(said, str) else said
        # On one GPU adapters need no strategy; all weights take fsdp, whose mixed precision keeps no bf16 copies.
        plan = planned(config_of(*row, gpus), gpus, gpus > 1 or row[2] not in ("lora", "dense", "factors"))
        # The table does not count what scores, which the next test does.
        counted = max(phase.bytes for phase in plan.phases if phase.name != "score")
        assert counted / 1e9 == pytest.approx(expected, rel=0.1), gpus


@pytest.mark.parametrize(("size", "frozen"), [("2b", "2b"), ("9b", "9b"), ("27b", "9b")])
def test_a_model_that_scores_is_whole_on_every_gpu_while_it_does(size, frozen):
    whole, judge = SIZES[size].parameters, SIZES[frozen].parameters
    plan = planned(config_of("rlhf", size, frozen, 8), 8)
    # fp32 weights, two moments and an anchor, a reference and a reward model in bf16, all in shares; one whole in bf16
    by_hand = (16 * whole + 2 * whole + 2 * judge) / 8 + 2 * max(whole, judge)
    [score] = [phase.bytes for phase in plan.phases if phase.name == "score"]
    assert score == pytest.approx(by_hand + 0.9e9 + 0.9e9, rel=0.03)  # libraries; logits and states


@pytest.mark.parametrize("size", SIZES)
def test_units_have_the_elements_of_the_model_on_the_meta_device(size):
    """What fsdp gathers: a decoder layer, and the root, which is embedding, head (tied) and the last norm."""
    shape = SIZES[size]
    config = Gemma2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
    )
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    layer, root = count(model.model.layers[0]), count(model) - count(model.model.layers)
    assert count(model) == shape.parameters
    units = {
        "forward": 2 * (root + 2 * layer),
        "layer": 2 * (2 * root + 3 * layer) + 4 * layer,
        "end": (2 + 4) * root,
    }
    place = MemoryPlace("accelerator", 8, True)
    for at, expected in units.items():
        [(_, amount)] = learning.gathered(shape, 2, place, at)
        assert amount.total == pytest.approx(expected, rel=1e-4), at


def test_numbers_that_were_to_be_reached():
    two = config_of("rlhf", "2b", "2b", 2)
    assert planned(two, 2).peak.bytes <= 45e9
    assert planned(config_of("rlhf", "9b", "factors", 2), 2).peak.bytes <= 55e9
    # With the dense anchor half a GB more, and that with the cache of 16 answers instead of 64: what scores is whole.
    less = {"vllm_memory": (2 * SIZES["9b"].parameters / 1e9 + CACHE["9b"] / 4) / 2 / 80 + 2 / 80}
    assert planned(config_of("rlhf", "9b", "dense", 2).model_copy(update=less), 2).peak.bytes <= 56e9
    assert planned(config_of("sft", "27b", "lora", 1), 1, sharded=False).peak.bytes <= 80e9
    # 9B full RLHF on 8 x 80 GB: the command that this was built for.
    assert planned(config_of("rlhf", "9b", "9b", 8), 8).peak.bytes <= 0.85 * CARD


def test_ddp_holds_everything_on_every_gpu_and_fsdp_a_share():
    config = config_of("rlhf", "2b", "2b", 4)

    def held(plan: MemoryPlan, name: str) -> float:
        return max(sum(one.bytes for one in phase.parts if one.name == name) for phase in plan.phases)

    ddp, fsdp = planned(config, 4, sharded=False), planned(config, 4)
    for name in ("weights", "optimizer", "EMA anchor", "reward models"):
        assert held(fsdp, name) == pytest.approx(held(ddp, name) / 4), name
    assert held(ddp, "gathered weights") == held(fsdp, "gradient buckets") == 0
    assert held(ddp, "gradient buckets") == 4 * SIZES["2b"].parameters


def test_the_rows_of_a_step_are_shared():
    config = SftConfig(model=Path("2b"), data=(ROWS,), batch_size=32)
    alone, shared = planned(config, 1), planned(config, 8)
    activations = [next(one.bytes for one in plan.peak.parts if one.name == "activations") for plan in (alone, shared)]
    assert activations[1] < activations[0] / 4
