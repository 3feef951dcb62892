"""A kernel that computes eager attention passes; one that drops the cap, the window, padding or borders does not."""

import math
from functools import partial

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, flex_attention_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from gemma2.posttrain.attention.kernel_check import KernelCheck, ProbeDistances, check_kernel
from gemma2.posttrain.attention.probe_network import (
    LENGTH,
    WINDOW,
    ProbeRows,
    probe_rows,
    scale_queries,
    small_network,
)

CPU = torch.device("cpu")
GEMMA = {
    "model_type": "gemma2",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 13,
}
LLAMA = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 4096}


def without_cap(attend, *arguments, **options):
    return attend(*arguments, **options | {"softcap": None})


def without_window(make, *arguments, **options):
    """Every layer is global. Padding comes as `attention_mask` and stays."""
    return make(*arguments, **options | {"mask_function": causal_mask_function})


def without_padding(make, *arguments, **options):
    return make(*arguments, **options | {"attention_mask": None})


PLANTED = {
    "without the soft cap": (partial(without_cap, eager_attention_forward), eager_mask),
    "without the window": (eager_attention_forward, partial(without_window, eager_mask)),
    "without the padding mask": (eager_attention_forward, partial(without_padding, eager_mask)),
}


@pytest.fixture
def planted():
    """Registers a kernel under a name of its own choosing and takes it out again."""
    names = []

    def plant(attend, make):
        name = f"planted_{len(names)}"
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, make)
        names.append(name)
        return name

    yield plant
    for name in names:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("fault", PLANTED)
def test_a_kernel_that_drops_a_part_is_found_and_the_part_is_named(planted, fault, precision):
    check = check_kernel(GEMMA, planted(*PLANTED[fault]), precision, CPU, learns=False)
    assert not check.right
    assert check.nearest == fault
    assert fault in check.figures()


def test_gradients_alone_give_a_kernel_away(planted):
    """Forward as it should be, the gradient of the keys lost on the way."""

    def attend(module, query, key, value, *arguments, **options):
        return eager_attention_forward(module, query, key.detach(), value, *arguments, **options)

    name = planted(attend, eager_mask)
    assert check_kernel(GEMMA, name, "float32", CPU, learns=False).right
    check = check_kernel(GEMMA, name, "float32", CPU, learns=True)
    assert not check.right
    assert check.off.states <= check.limit.states


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_eager_itself_is_within_the_limit_in_every_precision(planted, precision):
    check = check_kernel(GEMMA, planted(eager_attention_forward, eager_mask), precision, CPU, learns=True)
    assert check.right
    assert check.limit.states < 0.2  # a dropped part is more


def test_flex_attention_is_eager_attention_with_gradients_on_padded_and_packed_rows(uncompiled_flex):
    check = check_kernel(GEMMA, "flex_attention", "float32", CPU, learns=True, packed=True)
    assert check.right
    assert check.off.states < 1e-5
    assert check.off.gradients < 1e-4


def test_flex_attention_under_autocast_where_keys_are_wide_and_values_narrow(uncompiled_flex):
    assert check_kernel(GEMMA, "flex_attention", "autocast", CPU, learns=True).right


def test_flex_attention_without_its_cap_is_found(uncompiled_flex, planted):
    name = planted(partial(without_cap, flex_attention_forward), flex_attention_mask)
    assert check_kernel(GEMMA, name, "autocast", CPU, learns=False).nearest == "without the soft cap"


def test_packed_rows_that_see_each_other_are_found(planted):
    """A kernel that looks at the causal mask alone."""
    name = planted(eager_attention_forward, partial(without_window, eager_mask))
    settings = {key: value for key, value in GEMMA.items() if key not in ("sliding_window", "layer_types")}
    settings["layer_types"] = ["full_attention"]
    assert check_kernel(settings, name, "float32", CPU, learns=False).right
    check = check_kernel(settings, name, "float32", CPU, learns=False, packed=True)
    assert check.nearest == "without the borders of packed rows"


@pytest.mark.parametrize("settings", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_sdpa_is_right_for_families_without_a_cap(settings):
    assert check_kernel(settings, "sdpa", "float32", CPU, learns=True, packed=True).right


def test_the_probe_has_the_models_heads_and_longer_rows_than_its_window():
    network = small_network(GEMMA)
    assert network.config.head_dim == 16
    assert network.config.num_attention_heads // network.config.num_key_value_heads == 2
    assert network.config.sliding_window == WINDOW < LENGTH
    assert network.config.layer_types == ["sliding_attention", "full_attention"]
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in network.parameters())


def test_the_cap_matters_on_the_probe_and_not_on_an_unscaled_one():
    """Why queries are scaled: a plain comparison of a small model passes without a cap."""
    rows = probe_rows()["right-padded"]
    scaled, plain = small_network(GEMMA), small_network(GEMMA)
    scale_queries(plain, 1.0, rows.ids)

    def moved(network):
        with torch.no_grad():
            before = network(rows.ids).logits
            for layer in network.base_model.layers:
                layer.self_attn.attn_logit_softcapping = None
            return float((network(rows.ids).logits - before).abs().max())

    assert moved(scaled) > 100 * moved(plain)


def test_the_limit_is_between_rounding_and_the_smallest_fault():
    limit = ProbeDistances(0.1, 0.2)
    assert KernelCheck("k", "autocast", "packed", ProbeDistances(0.1, 0.2), limit, True).right
    assert not KernelCheck("k", "autocast", "packed", ProbeDistances(0.1001, 0.0), limit, True).right
    assert not KernelCheck("k", "autocast", "packed", ProbeDistances(0.0, 0.3), limit, True).right
    assert not KernelCheck("k", "autocast", "packed", ProbeDistances(math.nan, 0.0), limit, True).right


def test_rows_have_padding_on_both_sides_and_packed_rows_restart():
    forms = probe_rows()
    both = forms["padded on either side"]
    assert not both.present[0, 0]
    assert not both.present[1, -1]
    packed: ProbeRows = forms["packed"]
    assert sum(ids.shape[1] for ids in packed.alone) == packed.ids.shape[1]
    assert packed.positions is not None
    assert int((packed.positions == 0).sum()) == 2
