"""One step of the fast decoder gives the logits of transformers, in every family that it takes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_sampler import PAD, STOP, VOCAB, gemma, generate, prompts_of
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gemma2.posttrain.models.attention import additive, empty_cache, layer_masks, padded_masks
from gemma2.posttrain.models.decoder import FAMILIES, StepDecoder
from gemma2.posttrain.models.sampler import SamplingParams, sample

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
MODELS = {
    "gemma 2": lambda: gemma(),
    "gemma 2 with biases and silu": lambda: gemma(attention_bias=True, hidden_activation="silu"),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama 3, biases, tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "mistral, one head of keys, a window": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE | {"num_key_value_heads": 1, "sliding_window": 8, "head_dim": 6})
    ),
    "qwen 2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen 2, windows": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **SLIDING)),
    "qwen 3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "qwen 3, windows": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, **SLIDING)),
}


def made(name):
    """The model with norms and biases that are not one and zero: a left-out one shows."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in part else 0.5))
    return model


def test_every_family_is_in_the_table():
    assert {type(made(name)) for name in MODELS} == set(FAMILIES)


def stepped(model, through):
    """Logits (steps, 3, V) after each of 20 tokens, past the window, with padding on the left."""
    lengths, steps = [11, 3, 7], 20
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (3, width + steps), generator=torch.Generator().manual_seed(0))
    padding = width - torch.tensor(lengths)
    present = torch.arange(width + steps) >= padding[:, None]
    positions = (torch.arange(width + steps) - padding[:, None]).clamp(min=0)
    mask = additive(present[:, None, None], model.dtype)
    cache = empty_cache(model.config)
    decoder = StepDecoder(model, width + steps)
    found = []
    with torch.no_grad():
        prefill = {"attention_mask": padded_masks(model, present[:, :width]), "past_key_values": cache}
        model(ids[:, :width], position_ids=positions[:, :width], **prefill)
        for t in range(width, width + steps):
            seen = mask[..., : t + 1]
            if through == "decoder":
                found.append(decoder.step(cache, ids[:, t], positions[:, t], seen))
                continue
            step = {"attention_mask": layer_masks(model.config, seen), "past_key_values": cache}
            found.append(model(ids[:, t : t + 1], position_ids=positions[:, t : t + 1], **step).logits[:, -1].float())
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_gives_the_logits_of_transformers(name):
    model = made(name)
    assert StepDecoder.fits(model)
    expected = stepped(model, "transformers")
    assert (stepped(model, "decoder") - expected).abs().max() < 5e-5 * expected.std()


@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_the_decoder_is_as_close_to_fp32_as_transformers(name):
    narrow = made(name).bfloat16()
    ours, theirs = stepped(narrow, "decoder"), stepped(narrow, "transformers")
    exact = stepped(narrow.float(), "transformers")
    assert (ours - exact).square().mean() < 2 * (theirs - exact).square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_generate_in_every_family(name):
    """With padding, past the windows; a key that an unused window or a wrong rotation would miss changes the text."""
    model = made(name)
    prompts = prompts_of([9, 4, 16])
    ours = sample(model, prompts, SamplingParams(24, temperature=0.0), [STOP], PAD)
    assert ours.ids == generate(model, prompts, 24)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
def test_the_decoder_declines_models_that_it_does_not_support():
    assert StepDecoder.fits(gemma())
    assert not StepDecoder.fits(gemma(hidden_activation="relu"))
    longer = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not StepDecoder.fits(LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=longer)))
    for fields in ({"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "use_dora": True}):
        assert not StepDecoder.fits(get_peft_model(gemma(), LoraConfig(**fields)).get_base_model())
    with_bias = LoraConfig(target_modules=["q_proj"], lora_bias=True)
    assert not StepDecoder.fits(get_peft_model(made("qwen 2"), with_bias).get_base_model())
    adapted = get_peft_model(gemma(), LoraConfig(target_modules=["q_proj"]))
    with adapted.disable_adapter():
        assert not StepDecoder.fits(adapted.get_base_model())
    assert StepDecoder.fits(adapted.get_base_model())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["gemma 2", "llama 3, biases, tied", "qwen 3"])
def test_a_policy_with_adapters_is_decoded_with_their_products(name):
    """Greedy text of transformers' generate, whose layers add the adapters' outputs; and log-probs of a forward."""
    adapted = get_peft_model(made(name), LoraConfig(r=3, lora_alpha=9, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    policy = adapted.get_base_model()
    prompts = prompts_of([5, 3, 11])
    assert StepDecoder.fits(policy)
    expected = generate(policy, prompts, 24)
    assert sample(policy, prompts, SamplingParams(24, temperature=0.0), [STOP], PAD).ids == expected
    with adapted.disable_adapter():
        assert generate(policy, prompts, 24) != expected
    drawn = sample(policy, prompts, SamplingParams(12), [STOP], PAD, torch.Generator().manual_seed(0))
    for prompt, ids, logps in zip(prompts, drawn.ids, drawn.logps, strict=True):
        with torch.no_grad():
            scored = torch.log_softmax(policy(torch.tensor([[*prompt, *ids]])).logits[0].float(), -1)
        reference = scored[range(len(prompt) - 1, len(prompt) + len(ids) - 1), ids]
        assert torch.allclose(torch.tensor(logps), reference, atol=1e-5)
