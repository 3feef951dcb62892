"""The weights that decoding reads: made once for a rollout, in one copy, and gone after it."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_sampler import PAD, STOP, gemma, prompts_of

from gemma2.posttrain.models import decoder_blocks
from gemma2.posttrain.models.decoder import StepDecoder
from gemma2.posttrain.models.lora import weight_of
from gemma2.posttrain.models.sampler import SamplingParams, sample
from gemma2.posttrain.models.scorer import token_logps

PROMPTS = prompts_of([5, 3, 11, 7])
PARAMS = SamplingParams(12, n=2)
BATCHES = 4  # of one group each


def network(kind):
    """A Gemma 2 with caps and a window; `adapted`: with adapters whose products are not zero."""
    model = gemma()
    if kind == "full":
        return model
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=9, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return adapted.get_base_model()


def drawn(model, batch_size, half):
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        return sample(model, PROMPTS, PARAMS, [STOP], PAD, generator, batch_size)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("kind", ["full", "adapted"])
def test_a_rollout_of_several_batches_forms_each_weight_once(kind, half, monkeypatch):
    model, formed = network(kind), []

    def spy(linear):
        formed.append(linear)
        return weight_of(linear)

    monkeypatch.setattr(decoder_blocks, "weight_of", spy)
    ours = drawn(model, 1, half)
    linears = 7 * model.config.num_hidden_layers
    assert len(formed) == len(set(map(id, formed))) == linears

    def for_every_batch(*arguments, **options):
        return decode(*arguments, **options | {"weights": None})

    from gemma2.posttrain.models import sampler

    decode = sampler.decode
    monkeypatch.setattr(sampler, "decode", for_every_batch)
    assert drawn(model, 1, half) == ours
    assert len(formed) == (2 + BATCHES) * linears


def alive(shapes):
    """(shape, dtype) of every tensor of one of these shapes that Python can reach, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and tuple(thing.shape) in shapes:
            found[thing.data_ptr()] = (tuple(thing.shape), thing.dtype)
    return list(found.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["full", "adapted"])
def test_under_autocast_decoding_holds_one_narrow_copy_and_no_second_wide_one(kind, monkeypatch):
    model = network(kind)
    layer = model.model.layers[0]
    projections = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
    linears = [*projections, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj]
    shapes = {tuple(linear.weight.shape) for linear in linears}
    joined = (sum(linear.weight.shape[0] for linear in projections), linears[0].weight.shape[1])
    shapes.add(joined)
    before = alive(shapes)
    assert torch.bfloat16 not in {dtype for _, dtype in before}
    seen = []
    step = StepDecoder.step

    def spy(self, *arguments):
        if not seen:
            seen.append(alive(shapes))
        return step(self, *arguments)

    monkeypatch.setattr(StepDecoder, "step", spy)
    drawn(model, 2, True)
    (during,) = seen
    wide = [kind for kind in during if kind[1] == torch.float32]
    assert sorted(wide, key=str) == sorted(before, key=str)
    narrow = [shape for shape, dtype in during if dtype == torch.bfloat16]
    layers = model.config.num_hidden_layers
    assert narrow.count(joined) == layers
    assert len(narrow) == layers * 5  # q, k and v joined, o, gate, up, down
    assert sorted(alive(shapes), key=str) == sorted(before, key=str)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["full", "adapted"])
def test_the_sampler_and_the_scorer_differ_by_the_rounding_of_bf16(kind):
    model = network(kind)
    ours = drawn(model, 4, True)
    prompts = [PROMPTS[i] for i in ours.prompt_index]
    with torch.autocast("cpu", torch.bfloat16):
        half = token_logps(model, prompts, ours.ids)
    exact = token_logps(model, prompts, ours.ids)
    ours_from_exact = torch.cat([torch.tensor(a) - b for a, b in zip(ours.logps, exact, strict=True)])
    half_from_exact = torch.cat([a - b for a, b in zip(half, exact, strict=True)])
    # Rounding products once is no further from fp32 than the scorer, which rounds weights and products separately.
    assert 0 < ours_from_exact.square().mean() < 2 * half_from_exact.square().mean()
