"""What `gemma2 plan` counts for `--base-bits`: the bytes of the layers themselves, and sums by hand for 2B and 9B."""

import math
from pathlib import Path

import pytest
import torch

from gemma2.posttrain.planning.memory import MemoryPlace, memory_of, place_for
from gemma2.posttrain.planning.parts import Lengths
from gemma2.posttrain.planning.shapes import SIZES, shape_of_config
from gemma2.posttrain.planning.verdicts import judge
from gemma2.posttrain.quantisation.convert import quantise
from gemma2.posttrain.quantisation.quantised_linear import QuantisedLinear
from gemma2.posttrain.schemas import RlhfConfig, SftConfig
from gemma2.posttrain.tiny.networks import random_model

GB = 1e9
CARD = MemoryPlace("accelerator", 1, capacity=24 * GB)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_what_the_layers_hold(bits, dtype):
    model = random_model(hidden_size=192, intermediate_size=320, head_dim=64).to(dtype)
    shape = shape_of_config(model.config.to_dict())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    quantise(model, bits, torch.device("cpu"))
    held = sum(module.stored_bytes() for module in model.modules() if isinstance(module, QuantisedLinear))
    held += sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if "_proj" not in name
    )
    assert shape.quantised_bytes(bits, dtype.itemsize) == held


def planned(config, place=CARD):
    return memory_of(config, lambda path: SIZES[str(path)], place, Lengths())


def parts(plan, phase):
    found = next(one for one in plan.phases if one.name == phase)
    return {part.name: part.bytes for part in found.parts}


def sft(size, **more):
    return SftConfig(**{"model": size, "data": "d", "lora_rank": 16, "micro_batch_size": 1} | more)


# Gemma 2 report, Table 1: width, heads x 256, key heads x 256, inner width, layers.
BLOCKS = {"2b": (2304, 2048, 1024, 9216, 26), "9b": (3584, 4096, 2048, 14336, 42)}


@pytest.mark.parametrize("size", BLOCKS)
def test_weights_of_a_4_bit_base_are_the_sum_by_hand(size):
    width, queries, keys, inner, layers = BLOCKS[size]
    matrices = [width * queries, width * keys, width * keys, queries * width, *([width * inner] * 3)]
    rest = 256_000 * width + (4 * layers + 1) * width  # the tied embedding, four norms a layer and the last
    ranks = [width + queries, width + keys, width + keys, queries + width, *([width + inner] * 3)]
    adapters = 4 * 16 * layers * sum(ranks)
    four = sum(n / 2 + n / 64 + 4 * math.ceil(n / 64 / 256) + 4 * 273 for n in matrices) * layers
    weights = parts(planned(sft(size, base_bits=4)), "train")["weights"]
    assert weights == pytest.approx(four + 2 * rest + adapters, rel=1e-12)
    assert four / sum(matrices) / layers * 8 == pytest.approx(4.127, abs=2e-3)  # bits an element
    assert parts(planned(sft(size)), "train")["weights"] == pytest.approx(
        2 * (sum(matrices) * layers + rest) + adapters, rel=1e-12
    )


def test_the_sizes_that_are_said_to_fit_24_gb_do():
    rl = {"prompts": "p", "lora_rank": 16, "micro_batch_size": 4, "n": 4}
    configs = {
        "2b sft": sft("2b", max_length=2048, base_bits=4),
        "9b sft": sft("9b", max_length=2048, base_bits=4),
        "2b rlhf": RlhfConfig(**rl, policy="2b", reward=["2b"], base_bits=4),
        "9b rlhf": RlhfConfig(**rl, policy="9b", reward=["2b"], base_bits=4),
    }
    peaks = {name: planned(config).peak.bytes / GB for name, config in configs.items()}
    assert all(peak < 24 for peak in peaks.values()), peaks
    assert planned(RlhfConfig(**rl, policy="9b", reward=["2b"], lora_anchor="factors")).peak.bytes > 24 * GB
    dense = RlhfConfig(**rl, policy="9b", reward=["2b"], base_bits=4, lora_anchor="dense")
    assert parts(planned(dense), "train")["EMA anchor"] == 4 * SIZES["9b"].linear_elements()
    assert planned(dense).peak.bytes > 24 * GB


def test_decoding_makes_no_copy_of_a_quantised_base():
    rl = {"policy": "2b", "prompts": "p", "reward_fn": ["a:b"], "lora_rank": 16, "lora_anchor": "factors"}
    with_copies, without = (parts(planned(RlhfConfig(**rl, **more)), "generate") for more in ({}, {"base_bits": 8}))
    assert with_copies["copies of weights for decoding"] == 2 * SIZES["2b"].linear_elements()
    assert "copies of weights for decoding" not in without
    assert without["dequantised matrix"] == 2 * 2304 * 9216


def test_few_bits_are_what_makes_9b_fit():
    whole = {"model": "9b", "data": "d", "micro_batch_size": 1, "max_length": 4096, "attention": "eager"}
    for config in (SftConfig(**whole), SftConfig(**whole, lora_rank=16)):
        found = judge(config, lambda path: SIZES[str(path)], CARD)
        assert not found.fits
        assert "--base-bits 4" in found.advice
        update = {"base_bits": 4, "lora_rank": 16}
        assert judge(config.model_copy(update=update), lambda path: SIZES[str(path)], CARD).fits
    rl = {"policy": "9b", "prompts": "p", "reward_fn": ["a:b"], "lora_rank": 16, "micro_batch_size": 4}
    assert "--base-bits 4 --lora-anchor factors" in judge(RlhfConfig(**rl), lambda path: SIZES[str(path)], CARD).advice


def test_a_quantised_base_is_whole_on_every_process():
    config = sft("9b", base_bits=4)
    place = place_for(config, lambda path: SIZES[str(path)], Lengths(), "accelerator", 8 * GB, 4)
    assert not place.full_shard
    with pytest.raises(ValueError, match="strategy=fsdp divides weights over processes"):
        sft("9b", base_bits=4, strategy="fsdp")
    assert Path("9b") == config.model
