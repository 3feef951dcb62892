"""Memory of every command by part and phase: hand sums of the three sizes, what a part depends on, what more costs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma2.posttrain.planning.activations import NetworkInUse, RowBatch, cpu_parts
from gemma2.posttrain.planning.answering import of_chat
from gemma2.posttrain.planning.memory import OF_COMMAND, Lengths, MemoryPlace, MemoryPlan, memory_of
from gemma2.posttrain.planning.parts import GAPS, GIVEN_BACK, Bytes, Moment, blocks, settled
from gemma2.posttrain.planning.shapes import SIZES, ModelShape, shape_of, shape_of_config, shape_of_parameters
from gemma2.posttrain.schemas import (
    DistillCacheConfig,
    DistillConfig,
    EvalConfig,
    GenerateConfig,
    PairsConfig,
    ParetoConfig,
    ProbeConfig,
    RewardConfig,
    RewardEvalConfig,
    RewardScoreConfig,
    RlhfConfig,
    SftConfig,
    WarpConfig,
)
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.schemas.measures import SuiteConfig

GIB = 2.0**30
MODEL, ROWS = Path("2b"), Path("rows")
CPU, GPU = MemoryPlace("cpu"), MemoryPlace("accelerator")
# docs/science.md has the shapes; sums by hand, GiB: 2B, 9B, 27B.
WEIGHTS = (9.74, 34.43, 101.43)
TRAINING = (38.96, 137.71, 405.72)
CACHE_WINDOW, CACHE = (0.609, 1.969, 2.156), (0.812, 2.625, 2.875)
SCORES = (2.00, 4.00, 8.00)


def planned(config: Config, place: MemoryPlace = CPU, lengths: Lengths | None = None) -> MemoryPlan:
    plan = memory_of(config, shape_of, place, lengths)
    assert plan is not None
    return plan


def part(plan: MemoryPlan, phase: str, name: str) -> float:
    """Bytes of one part of one phase, 0 if it is not there."""
    (found,) = [one for one in plan.phases if one.name == phase]
    return sum(each.bytes for each in found.parts if each.name == name)


def every_command() -> Iterator[Config]:
    yield SftConfig(model=MODEL, data=ROWS)
    yield SftConfig(model=MODEL, data=ROWS, lora_rank=16)
    yield DistillConfig(model=MODEL, teacher="9b", prompts=ROWS)
    yield DistillCacheConfig(teacher=MODEL, data=ROWS)
    yield RewardConfig(model=MODEL, data=ROWS)
    yield ProbeConfig(model=MODEL, data=ROWS)
    yield RewardScoreConfig(model=MODEL, data=ROWS)
    yield RewardEvalConfig(models=(MODEL,), data=ROWS)
    yield PairsConfig(model=MODEL, prompts=ROWS, judge="2b")
    yield RlhfConfig(policy=MODEL, prompts=ROWS, reward=MODEL)
    yield RlhfConfig(policy=MODEL, prompts=ROWS, reward=MODEL, lora_rank=16)
    yield WarpConfig(sft=MODEL, prompts=ROWS, heldout=ROWS, reward=MODEL)
    yield GenerateConfig(teacher=MODEL, prompts=ROWS)
    yield EvalConfig(model="9b", sft=MODEL, prompts=ROWS, reward=MODEL)
    yield ParetoConfig(sft=MODEL, merged=MODEL, prompts=ROWS, reward=MODEL)
    yield SuiteConfig(model=MODEL, data=ROWS)


COMMANDS = list(every_command())
NAMES = [type(config).__name__ + ("-lora" if getattr(config, "lora_rank", 0) else "") for config in COMMANDS]


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", range(3), ids=list(SIZES))
def test_sizes_have_the_sums_made_by_hand(column):
    name = list(SIZES)[column]
    shape = shape_of(Path(name))
    assert shape.parameters == (2_614_341_888, 9_241_705_984, 27_227_128_320)[column]
    near = {"rel": 0.005}
    assert shape.parameters * 4 / GIB == pytest.approx(WEIGHTS[column], **near)
    assert shape.cache_bytes(8192, 2, windowed=True) / GIB == pytest.approx(CACHE_WINDOW[column], **near)
    assert shape.cache_bytes(8192, 2) / GIB == pytest.approx(CACHE[column], **near)
    assert shape.scores_bytes(8192) / GIB == pytest.approx(SCORES[column], **near)
    assert shape.vocabulary * 4 * 1024 / GIB == pytest.approx(0.977, **near)
    plan = planned(SftConfig(model=name, data=ROWS, micro_batch_size=1), CPU, Lengths(8))
    fixed = [part(plan, "train", each) for each in ("weights", "optimizer")]
    assert (sum(fixed) + 4 * shape.parameters) / GIB == pytest.approx(TRAINING[column], **near)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_counted_by_its_rank_and_its_targets():
    shape = SIZES["2b"]
    # q: 2304 -> 2048, in 26 layers; weights, gradients and two moments in fp32
    elements = 26 * 16 * (2304 + 2048)
    assert shape.adapter_parameters(16, ("q_proj",)) == elements
    plan = planned(SftConfig(model=MODEL, data=ROWS, lora_rank=16, lora_targets=("q_proj",)))
    assert part(plan, "train", "optimizer") == 8 * elements
    assert part(plan, "train", "weights") == 4 * (shape.parameters + elements)
    wider = planned(SftConfig(model=MODEL, data=ROWS, lora_rank=16))
    assert part(wider, "train", "optimizer") > 8 * part(plan, "train", "optimizer") / 2


@pytest.mark.parametrize(
    ("settings", "reference", "anchor"),
    [
        ({}, 1, 1),
        ({"anchor": "none"}, 1, 0),
        ({"anchor": "sft"}, 1, 0),
        ({"anchor_memory": "cpu"}, 1, 1.5),  # fp32 in the memory of the host, which here is the same, and a bf16 copy
        ({"lora_rank": 8, "lora_anchor": "factors"}, 0, SIZES["2b"].adapter_parameters(8) / SIZES["2b"].parameters),
        ({"lora_rank": 8}, 0, SIZES["2b"].adapted_weights() / SIZES["2b"].parameters),
        ({"lora_rank": 8, "sft": "9b"}, SIZES["9b"].parameters / SIZES["2b"].parameters, None),
    ],
)
def test_rl_holds_reference_and_anchor_as_it_is_told(settings, reference, anchor):
    plan = planned(RlhfConfig(policy=MODEL, prompts=ROWS, reward=("2b", "9b"), **settings))
    whole = 4 * SIZES["2b"].parameters
    for phase in ("generate", "score", "train"):
        assert part(plan, phase, "reference") == pytest.approx(reference * whole)
        assert part(plan, phase, "reward models") == whole + 4 * SIZES["9b"].parameters
        if anchor is not None:
            assert part(plan, phase, "EMA anchor") == pytest.approx(anchor * whole)


def test_a_warm_ensemble_is_one_reward_model():
    plan = planned(RlhfConfig(policy=MODEL, prompts=ROWS, reward=("2b", "9b"), reward_ensemble="warm"))
    assert part(plan, "score", "reward models") == 4 * SIZES["2b"].parameters


def test_a_tied_embedding_of_a_wide_vocabulary_has_two_gradients():
    plan = planned(SftConfig(model=MODEL, data=ROWS, batch_size=1, micro_batch_size=1), CPU, Lengths(8))
    assert part(plan, "train", "gradients") == 4 * (SIZES["2b"].parameters + SIZES["2b"].embedding)


def test_a_pass_on_a_cpu_is_cut_into_parts_of_whole_rows():
    assert cpu_parts(RowBatch(16, 256), 2048) == RowBatch(8, 256)
    assert cpu_parts(RowBatch(2, 300), 2048) == RowBatch(2, 300)
    assert cpu_parts(RowBatch(16, 5000), 2048) == RowBatch(1, 5000)


def test_one_block_keeps_what_was_counted_with_hooks():
    """torch's saved tensors of one layer, 2 rows of 64 tokens: 837 elements a token, with adapters of rank 4 737."""
    shape = ModelShape(0, 32, 80, 1, 4, 2, 16, 64, 4096, 1)
    batch = RowBatch(2, 64)
    scores = 2 * 2 * 4 * 64 * 64 * 4
    full = NetworkInUse(shape, "blockwise").block_bytes(batch, True).total - scores
    assert full / 4 / batch.count == pytest.approx(837, rel=0.005)
    adapters = (
        NetworkInUse(shape, "blockwise", trained=False, rank=4, adapted=7).block_bytes(batch, True).total - scores
    )
    assert adapters / 4 / batch.count == pytest.approx(737, rel=0.005)


def test_eager_attention_keeps_all_scores_and_blocks_about_half():
    shape = SIZES["2b"]
    batch = RowBatch(1, 2048)
    eager = NetworkInUse(shape, "eager").scores(batch, False)
    assert eager == 8 * 2048 * 2048
    assert 0.5 < NetworkInUse(shape, "blockwise").scores(batch, False) / eager < 0.53
    assert NetworkInUse(shape, "flash").scores(batch, False) == 0
    far = RowBatch(1, 8192)  # the window is 4096
    assert NetworkInUse(shape, "blockwise").scores(far, True) < NetworkInUse(shape, "blockwise").scores(far, False)


@pytest.mark.parametrize(
    ("schema", "given", "phase"),
    [
        (SftConfig, {"model": MODEL, "data": ROWS}, "train"),
        (RewardConfig, {"model": MODEL, "data": ROWS}, "train"),
        (DistillConfig, {"model": MODEL, "teacher": "9b", "prompts": ROWS, "max_new_tokens": 1024}, "train"),
        (RlhfConfig, {"policy": MODEL, "prompts": ROWS, "reward": MODEL, "max_new_tokens": 1024}, "score"),
        (RewardScoreConfig, {"model": MODEL, "data": ROWS}, "score"),
        (DistillCacheConfig, {"teacher": MODEL, "data": ROWS}, "score"),
        (EvalConfig, {"model": "9b", "sft": MODEL, "prompts": ROWS, "max_new_tokens": 1024, "reward": MODEL}, "score"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_on_an_accelerator_eager_attention_holds_scores_and_the_others_do_not(schema, given, phase):
    kernels = ("eager", "auto", "flex_attention", "flash_attention_2")
    held = {name: part(planned(schema(**given, attention=name), GPU), phase, "activations") for name in kernels}
    assert held["eager"] > 1.1 * held["auto"]
    assert held["auto"] == held["flex_attention"] == held["flash_attention_2"]
    on_a_cpu = {
        name: part(planned(schema(**given, attention=name)), phase, "activations") for name in ("auto", "eager")
    }
    assert on_a_cpu["auto"] == on_a_cpu["eager"]


def test_checkpointing_keeps_the_edges_of_blocks():
    config = {"model": MODEL, "data": ROWS, "micro_batch_size": 4}
    kept = planned(SftConfig(**config, trainer={"activation_checkpointing": False}), GPU)
    again = planned(SftConfig(**config), GPU)
    assert part(again, "train", "activations") < part(kept, "train", "activations") / 5


# --- more is never less -----------------------------------------------------------------------------------------------


def in_use(plan: MemoryPlan) -> float:
    """The largest phase, without what the allocator keeps: blocks that grow beyond 32 MiB are given back."""
    sums = [sum(each.bytes for each in one.parts if each.name != "allocator slack") for one in plan.phases]
    return round(max(sums), 3)


@pytest.mark.parametrize("place", [CPU, GPU], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("config", COMMANDS, ids=NAMES)
def test_longer_rows_and_larger_batches_never_need_less(config, place):
    sizes = [in_use(planned(config, place, Lengths(n, n))) for n in (16, 64, 256, 1000, 4000)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    for name in type(config).model_fields.keys() & {"batch_size", "micro_batch_size", "max_new_tokens"}:
        # A batch of several micro-batches: their gradients are added up, those of one are not.
        several = {"batch_size": 64} if "batch_size" in type(config).model_fields else {}
        grown = [
            in_use(planned(config.model_copy(update=several | {name: n}), place, Lengths(64, 64))) for n in (2, 8, 32)
        ]
        assert grown == sorted(grown), name


@pytest.mark.parametrize("config", COMMANDS, ids=NAMES)
def test_more_devices_that_share_the_weights_never_need_more_each(config):
    sizes = [
        planned(config, MemoryPlace("accelerator", n, full_shard=True), Lengths(64, 64)).peak.bytes for n in (2, 4, 8)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size > 0 for size in sizes)


def test_every_command_has_its_phases_and_every_table_entry_a_command():
    assert {type(config) for config in COMMANDS} == set(OF_COMMAND)
    for config in COMMANDS:
        plan = planned(config)
        assert plan.peak in plan.phases
        assert plan.peak.bytes == max(one.bytes for one in plan.phases)
        assert all(each.bytes > 0 for one in plan.phases for each in one.parts)
    assert [one.name for one in planned(COMMANDS[9]).phases] == ["generate", "score", "start", "train"]


def test_chat_holds_its_models_and_their_caches():
    (phase,) = settled(of_chat([SIZES["2b"], SIZES["2b"]], 8192, GPU), GPU).phases
    held = {each.name: each.bytes for each in phase.parts}
    assert held["weights"] == 4 * SIZES["2b"].parameters
    assert held["KV cache"] > 2 * SIZES["2b"].cache_bytes(8192, 2)


# --- allocator --------------------------------------------------------------------------------------------------------


def test_small_blocks_stay_with_the_process_and_large_ones_do_not():
    small, large = Bytes(0, 100.0), blocks(GIVEN_BACK)
    assert large == Bytes(GIVEN_BACK, 0)
    plan = settled([Moment("first", [("activations", small + large)]), Moment("last", [("weights", Bytes(7.0))])], CPU)
    assert part(plan, "first", "allocator slack") == pytest.approx(GAPS * 100)
    assert part(plan, "last", "allocator slack") == pytest.approx((1 + GAPS) * 100)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_a_configuration_gives_the_shape_of_its_size():
    config = {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256_000,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "max_position_embeddings": 8192,
    }
    assert shape_of_config(config) == SIZES["2b"]
    assert shape_of_config(config | {"layer_types": ["full_attention"] * 26}).local_layers == 0


def test_a_model_of_which_only_the_size_is_known_has_its_weights():
    plan = memory_of(COMMANDS[0], lambda _: shape_of_parameters(1e9), MemoryPlace(baseline=0.0))
    assert plan is not None
    assert plan.peak.bytes >= 16e9
