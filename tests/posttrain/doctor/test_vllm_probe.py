"""vLLM's attention against eager attention, on a stand-in for vLLM that may drop a part of it."""

import sys

import fake_vllm
import pytest

from gemma2.core.errors import InputError
from gemma2.posttrain.doctor.checks.subject import Subject
from gemma2.posttrain.doctor.vllm_probe import refuse_wrong_attention, vllm_attention
from gemma2.posttrain.evaluation.suite.engines import open_engine
from gemma2.posttrain.schemas.config import resolve
from gemma2.posttrain.schemas.measures import SuiteConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def without_cap(network):
    for layer in network.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def without_window(network):
    network.config.sliding_window = 10_000


def without_final_cap(network):
    network.config.final_logit_softcapping = None


@pytest.mark.parametrize(
    ("drops", "said"),
    [
        (without_cap, "without the soft cap of attention"),
        (without_window, "without the sliding window"),
        (without_final_cap, "without the cap of the final logits"),
    ],
)
def test_a_vllm_that_drops_a_part_is_refused_with_the_figures(sound, monkeypatch, drops, said):
    monkeypatch.setattr(fake_vllm.LLM, "drops", staticmethod(drops))
    with pytest.raises(InputError, match=rf"{said}: log-probs are 0\.\d+ from {said}"):
        refuse_wrong_attention(sound / "policy", fake_vllm.module())


def test_a_right_one_is_asked_once_and_is_near_although_it_computes_in_bf16(sound, monkeypatch, tmp_path):
    vllm = fake_vllm.module()
    found = vllm_attention(Subject(sound / "policy"), vllm)
    wrong = [value for name, value in found.distances.items() if name != found.name]
    assert found.right and len(wrong) == 3
    assert found.distances[found.name] < 0.5 * min(wrong)
    made = len(fake_vllm.LLM.made)
    for _ in range(2):
        refuse_wrong_attention(sound / "policy", vllm)
    assert len(fake_vllm.LLM.made) == made + 1
    refuse_wrong_attention(sound / "policy", vllm, dtype="float32")  # and another precision is another one
    assert len(fake_vllm.LLM.made) == made + 2
    exact = vllm_attention(Subject(sound / "policy"), vllm, "float32").distances
    assert exact[found.name] < 1e-5 < found.distances[found.name]
    vllm.__version__ = "0.31.0"  # another vLLM is another answer
    monkeypatch.setattr(fake_vllm.LLM, "drops", staticmethod(without_cap))
    with pytest.raises(InputError, match=r"0\.31\.0"):
        refuse_wrong_attention(sound / "policy", vllm)


def test_a_vllm_that_cannot_run_the_probe_is_one_line(sound, monkeypatch):
    def fails(network):
        raise RuntimeError("no kernel\nfor this GPU")

    monkeypatch.setattr(fake_vllm.LLM, "drops", staticmethod(fails))
    with pytest.raises(InputError, match="probe: no kernel for this GPU"):
        refuse_wrong_attention(sound / "policy", fake_vllm.module())


def test_an_evaluation_by_vllm_is_refused_before_it_begins(sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    monkeypatch.setattr(fake_vllm.LLM, "drops", staticmethod(without_cap))
    config = resolve(SuiteConfig, flags={"model": sound / "policy", "engine": "vllm", "data": sound})
    with pytest.raises(InputError, match="without the soft cap of attention"):
        open_engine(config)
