"""Layers in 4 and 8 bits: what is stored, what products and gradients they give, what moving and copying does."""

import copy
import math

import pytest
import torch
from torch import nn

from gemma2.posttrain.quantisation.quantised_linear import QuantisedLinear, dequantised

CPU = torch.device("cpu")
# Quantiles of a normal distribution, 8 above and 7 below 0 (QLoRA, 2305.14314, appendix E), rounded to fp32.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
SIZES = [(48, 128), (61, 16), (17, 96), (3, 5)]  # rows that end with a block of 64, rows that do not, a part of a block


def linear(outputs=48, inputs=128, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data.normal_(0, 0.02)
    layer.weight.data[0, 0] = 0.3  # an outlier widens the steps of its block only, or of its row
    return layer.to(dtype)


def nf4_of(weight):
    """NF4 with exact scales: the nearest code of each element over the largest magnitude of its 64."""
    flat = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).view(-1, 64).double()
    scale = flat.abs().amax(1, keepdim=True).clamp(min=1e-30)
    code = torch.tensor(NF4, dtype=torch.float64)
    nearest = code[((flat / scale)[..., None] - code).abs().argmin(-1)] * scale
    return nearest.reshape(-1)[: weight.numel()].view(weight.shape), scale


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_four_bits_are_nf4_with_scales_that_are_rounded_to_eight_bits(size):
    layer = linear(*size)
    found = QuantisedLinear(layer, 4, CPU).dequantised().double()
    exact, scale = nf4_of(layer.weight.detach())
    # A scale is one of 256 values between the smallest and the largest: here within 2 % of the largest.
    assert (found - exact).abs().max() < 0.02 * scale.max()
    assert (found - layer.weight).norm() / layer.weight.norm() < 0.15


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_eight_bits_are_off_by_half_a_step_of_their_row_at_most(size):
    layer = linear(*size)
    found = QuantisedLinear(layer, 8, CPU).dequantised()
    steps = layer.weight.abs().amax(1, keepdim=True) / 127
    assert ((found - layer.weight).abs() <= steps * 0.5001).all()
    assert ((found / steps).round() - found / steps).abs().max() < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_takes_the_bytes_of_the_formula(bits):
    outputs, inputs = 256, 1024
    layer = QuantisedLinear(linear(outputs, inputs), bits, CPU)
    elements = outputs * inputs
    if bits == 4:  # half a byte, a byte for 64, fp32 for 256 blocks of 64; two tables and an offset
        expected = elements / 2 + elements / 64 + 4 * math.ceil(elements / 64 / 256) + 4 * (16 + 256 + 1)
    else:
        expected = elements + 4 * outputs
    assert layer.stored_bytes() == expected
    named = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
    assert named == elements * bits / 8


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_the_weight_that_it_stands_for(bits, dtype, bias):
    plain = linear(bias=bias, dtype=dtype)
    layer = QuantisedLinear(plain, bits, CPU)
    assert dequantised(plain) is plain.weight
    plain.weight.data = dequantised(layer)
    x = torch.randn(2, 7, 128).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = plain(theirs)
    found = layer(ours)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(layer(x), found.detach())  # without a gradient
    upstream = torch.randn(found.shape).to(dtype)
    found.backward(upstream)
    expected.backward(upstream)
    assert (ours.grad - theirs.grad).abs().max() <= tolerance * theirs.grad.abs().max()
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_the_backward_pass_keeps_no_weight():
    layer = QuantisedLinear(linear(), 8, CPU)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(2, 128, requires_grad=True)).sum()
    assert not [tensor for tensor in kept if tensor.numel() >= layer.weight.numel()]


@pytest.mark.parametrize("bits", [4, 8])
def test_under_autocast_products_are_in_its_dtype(bits):
    layer = QuantisedLinear(linear(), bits, CPU)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    expected = nn.functional.linear(x.bfloat16(), dequantised(layer).bfloat16())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_casting_a_model_changes_no_quantised_weight_and_copies_share_scales(bits):
    model = nn.Sequential(QuantisedLinear(linear(), bits, CPU), nn.Linear(48, 2))
    before = dequantised(model[0])
    model.bfloat16()
    assert model[1].weight.dtype == torch.bfloat16
    assert torch.equal(dequantised(model[0]), before)
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    assert shared[0].weight is model[0].weight
    assert shared[0].quantised is model[0].quantised
    apart = copy.deepcopy(model)
    assert apart[0].weight is not model[0].weight
    assert torch.equal(dequantised(apart[0]), before)
