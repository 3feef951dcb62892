"""What a manifest says of the device, the stack below torch, and the precision of a run."""

import sys
from types import SimpleNamespace

import pytest

from gemma2.posttrain.models import precision
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.runs.accelerator import accelerator_stack, precision_of
from gemma2.posttrain.schemas import GenerateConfig, PickConfig, RlhfConfig, SftConfig

GENERATE = GenerateConfig(teacher="t", prompts="p")
RLHF = RlhfConfig(policy="p", prompts="p", reward=("rm",))


def fake_torch(kind, **parts):
    """torch on a machine with two accelerators of a kind."""
    accelerator = SimpleNamespace(
        is_available=lambda: True,
        current_accelerator=lambda: SimpleNamespace(type=kind),
        device_count=lambda: 2,
    )
    return SimpleNamespace(accelerator=accelerator, **parts)


H200 = fake_torch(
    "cuda",
    cuda=SimpleNamespace(get_device_name=lambda: "NVIDIA H200", nccl=SimpleNamespace(version=lambda: (2, 27, 3))),
    version=SimpleNamespace(cuda="12.8", hip=None, xpu=None),
    backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91002)),
    _C=SimpleNamespace(_cuda_getDriverVersion=lambda: 12080),
)


def test_names_and_versions_are_those_that_torch_gives(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", H200)
    assert accelerator_stack(RLHF) == {
        **{"device": "NVIDIA H200", "devices": 2, "cuda": "12.8", "cudnn": 91002, "nccl": "2.27.3", "driver": 12080}
    }


def test_a_part_that_a_build_lacks_is_left_out(monkeypatch):
    version = SimpleNamespace(cuda=None, hip=None, xpu="20250201")
    device = SimpleNamespace(
        get_device_name=lambda: "Max 1550", get_device_properties=lambda: SimpleNamespace(driver_version="1.6")
    )
    monkeypatch.setitem(sys.modules, "torch", fake_torch("xpu", xpu=device, version=version))
    assert accelerator_stack(RLHF) == {"device": "Max 1550", "devices": 2, "xpu": "20250201", "driver": "1.6"}
    monkeypatch.setitem(sys.modules, "torch", fake_torch("other"))
    assert accelerator_stack(RLHF) == {"device": "other", "devices": 2}


def test_a_command_without_models_or_without_torch_says_nothing(monkeypatch):
    assert accelerator_stack(PickConfig(front="f")) == precision_of(PickConfig(front="f")) == {}
    monkeypatch.delitem(sys.modules, "torch")
    assert accelerator_stack(GENERATE) == precision_of(GENERATE) == {}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_precision_is_the_one_in_which_models_are_loaded(accelerated, dtype, monkeypatch):
    config = GENERATE.model_copy(update={"dtype": dtype})
    if accelerated:
        monkeypatch.setattr(precision, "default_device", lambda: SimpleNamespace(type="cuda"))
        monkeypatch.setitem(sys.modules, "torch", H200)
    found = precision_of(config)
    assert found == {"frozen": str(frozen_dtype(dtype)).removeprefix("torch."), "heads": "float32"}


def test_what_is_trained_is_fp32_with_products_as_autocast_makes_them(monkeypatch):
    sft = SftConfig(model="m", data="d")
    assert precision_of(sft)["products"] == "float32"
    monkeypatch.setitem(sys.modules, "torch", H200)
    assert precision_of(sft)["trained"] == "float32" and precision_of(sft)["products"] == "bfloat16"
    exact = sft.model_copy(update={"trainer": {"bf16": False}})
    assert precision_of(exact)["products"] == "float32"
    assert precision_of(RLHF).keys() == {"trained", "products", "frozen", "heads"}
