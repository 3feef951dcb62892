"""Decoding with fixed shapes draws what the row-by-row loop draws, and its step can be recorded and replayed."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_decoder import MODELS, made
from test_sampler import PAD, STOP, VOCAB, WINDOW, gemma, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma2.posttrain.models import sampler
from gemma2.posttrain.models.decoder_blocks import Norm
from gemma2.posttrain.models.replayed import captured_step, static_rows
from gemma2.posttrain.models.replayed.captured_step import CapturedStep, capture_on
from gemma2.posttrain.models.sampler import SamplingParams, decode

LIMIT = 28  # several looks of the host, and past the window of 8


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations of one run, repeated on the same tensors with the same numbers.

    Recording runs the step and then puts back what it wrote, since a graph is recorded without being run.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in self.written(operation, args, kwargs):
            if tensor.data_ptr() not in self.before:
                self.before[tensor.data_ptr()] = (tensor, tensor.clone())
        result = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, result))
        return result

    @staticmethod
    def written(operation, args, kwargs):
        named = dict(zip((a.name for a in operation._schema.arguments), args, strict=False)) | kwargs
        for argument in operation._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from (t for t in tree_leaves(named.get(argument.name)) if isinstance(t, torch.Tensor))

    def replay(self):
        with torch.no_grad():
            for operation, args, kwargs, result in self.operations:
                schema = operation._schema
                if not schema.is_mutable and any(each.alias_info is not None for each in schema.returns):
                    continue  # a view: it shows what its base holds
                again = operation(*args, **kwargs)
                if not schema.is_mutable:
                    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)


captured = []  # tapes of the test that runs


def record(work):
    tape = Tape()
    with tape:
        work()
    for tensor, value in reversed(tape.before.values()):
        tensor.copy_(value)
    captured.append(tape)
    return tape.replay


@pytest.fixture(autouse=True)
def _no_tapes():
    captured.clear()


FILTERED = "top-p, top-k, min-p"
WAYS = {
    "sampled": SamplingParams(LIMIT),
    "greedy": SamplingParams(LIMIT, temperature=0.0),
    FILTERED: SamplingParams(LIMIT, temperature=1.3, top_p=0.9, top_k=20, min_p=0.01),
}


def both(monkeypatch, model, params, prompts, stops=(STOP,), ends=None, capture=record):
    """(row by row, with fixed shapes) of the same random numbers."""
    uniforms = torch.rand(
        len(prompts), params.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    plain = decode(model, prompts, params, list(stops), PAD, uniforms, ends)
    monkeypatch.setattr(sampler, "fixed_shapes", lambda device: True)
    monkeypatch.setattr(sampler, "capture_on", lambda device: capture)
    return plain, decode(model, prompts, params, list(stops), PAD, uniforms, ends)


def same(plain, static, atol=2e-5):
    assert [ids for ids, _, _ in static] == [ids for ids, _, _ in plain]
    assert [cut for _, _, cut in static] == [cut for _, _, cut in plain]
    for (_, ours, _), (_, theirs, _) in zip(static, plain, strict=True):
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=atol)


CASES = [(name, "sampled") for name in MODELS] + [("gemma 2", "greedy"), ("gemma 2", FILTERED), ("llama", "greedy")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_replayed_steps_draw_what_the_row_by_row_loop_draws(name, way, monkeypatch):
    """With padding on the left, past every window, over several stretches, with rows that end and a shared prompt."""
    monkeypatch.setattr(static_rows, "SEGMENT", 16)
    prompts = prompts_of([11, 3, 7, 1, 20])
    prompts[3] = prompts[0]
    plain, static = both(monkeypatch, made(name), WAYS[way], prompts)
    same(plain, static)
    assert captured


def test_rows_end_in_the_middle_of_a_block_and_at_its_edges(monkeypatch):
    """Every length from 1 to the limit occurs, and truncated rows."""
    stops = range(3)
    prompts = prompts_of([5] * 60)
    plain, static = both(monkeypatch, gemma(), SamplingParams(19), prompts, stops)
    same(plain, static)
    lengths = {len(ids) for ids, _, cut in plain if not cut}
    assert {1, 7, 8, 9, 15, 16, 17} <= lengths
    assert any(cut for _, _, cut in plain)
    assert len(captured) == 2  # half of the rows left


def test_a_row_that_text_ends_is_cut_where_it_ended(monkeypatch):
    asked = []

    def ends(ids):
        asked.append(tuple(ids))
        return ids[-1] in (5, 18) or len(ids) == 25

    plain, static = both(monkeypatch, gemma(), SamplingParams(LIMIT), prompts_of([6, 14, 8, 2] * 4), (STOP,), ends)
    same(plain, static)
    assert {len(ids) for ids, _, _ in plain} > {25}  # one at the limit of the text, others before
    half = len(asked) // 2
    assert sorted(asked[:half]) == sorted(asked[half:])  # both ask the same questions


def test_under_autocast_the_tokens_are_the_same(monkeypatch):
    model = gemma()
    with torch.autocast("cpu", torch.bfloat16):
        plain, static = both(monkeypatch, model, SamplingParams(12), prompts_of([6, 14]))
    same(plain, static, atol=2e-2)


def test_without_a_capture_the_step_runs_plainly(monkeypatch):
    same(*both(monkeypatch, gemma(), SamplingParams(LIMIT), prompts_of([6, 14]), capture=None))
    assert not captured


class Waits(TorchDispatchMode):
    """Operations after which the host knows a value of the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "item")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        if name in self.NAMES:
            raise AssertionError(f"the step waits for the device: {name}")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vocabulary", [VOCAB, sampler.WIDE + 3])
def test_a_step_never_waits_for_the_device_and_the_host_looks_every_eighth_token(way, vocabulary, monkeypatch):
    monkeypatch.setattr(sampler, "RANKED", 32)
    advance, look = static_rows._StaticRows.advance, static_rows._StaticRows.look
    looks, steps = [], []

    def spy_advance(self):
        steps.append(len(self.rows))
        with Waits():
            advance(self)

    def spy_look(self, done, ends):
        looks.append(done)
        return look(self, done, ends)

    monkeypatch.setattr(static_rows._StaticRows, "advance", spy_advance)
    monkeypatch.setattr(static_rows._StaticRows, "look", spy_look)
    plain, static = both(monkeypatch, gemma(vocabulary), WAYS[way], prompts_of([6, 14]), (), capture=None)
    same(plain, static)
    assert looks == [1, 9, 17, 25, 28]
    assert len(steps) == LIMIT - 1


def test_the_row_by_row_loop_is_seen_to_wait():
    """The check above would notice: the loop of the CPU asks after every token."""
    with pytest.raises(AssertionError, match="waits for the device"), Waits():
        decode(gemma(), prompts_of([6]), SamplingParams(3), [STOP], PAD, torch.rand(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("planted", ["a number of the host", "a new tensor"])
def test_a_step_that_depends_on_the_host_gives_other_tokens(planted, monkeypatch):
    """What the tape is for: a step that keeps its count in Python, or its result in a new tensor, can't be replayed."""
    rows = static_rows._StaticRows

    def counted(self):
        self.positions = self.positions + 1 if planted == "a new tensor" else self.positions.add_(0)
        if planted == "a number of the host":
            self.host = getattr(self, "host", int(self.positions[0])) + 1
            self.positions.fill_(self.host)
        logits = self.step(self.layers, self.last, self.positions, self._masks())
        self.column.add_(1)
        self.record(logits)

    monkeypatch.setattr(rows, "advance", counted)
    plain, static = both(monkeypatch, gemma(), SamplingParams(LIMIT), prompts_of([6]), ())
    assert plain[0][0] != static[0][0]


def test_keys_of_later_columns_are_zeros_and_never_uninitialised(monkeypatch):
    """0 times NaN would be NaN: memory that was used before may hold any bits."""
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: plain(self, *a, **k).fill_(float("nan")))
    same(*both(monkeypatch, gemma(), SamplingParams(12), prompts_of([WINDOW, 3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma 2", "llama"])
def test_the_fused_norm_of_an_accelerator_is_the_same_norm(name, dtype):
    model = made(name).to(dtype)
    norm = Norm(model.model.norm, name == "gemma 2")
    x = (3 * torch.randn(5, 16)).to(dtype)
    plain, norm.fused = norm(x), True
    fused = norm(x)
    assert fused.dtype == plain.dtype == dtype
    assert torch.allclose(fused.float(), plain.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    norm.eps = 100.0
    assert not torch.allclose(norm(x), plain, rtol=0.1)


def test_a_step_warms_up_is_captured_once_and_replayed():
    seen = []

    def capture(work):
        seen.append("captured")
        return lambda: seen.append("replayed")

    step = CapturedStep(lambda: seen.append("ran"), capture)
    for _ in range(4):
        step()
    assert seen == ["ran", "captured", "replayed", "replayed", "replayed"]


class Graph:
    """torch.cuda as far as a capture asks for it; `events` is what happened."""

    events: ClassVar[list[str]] = []

    def capture_begin(self, **how):
        self.events.append(f"begin {how}")

    def capture_end(self):
        self.events.append("end")
        if "failed" in self.events:
            raise RuntimeError("the capture is void")

    def replay(self):
        self.events.append("replay")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(Graph, "events", [])
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda one: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Graph.events


def test_a_cuda_graph_is_recorded_between_its_begin_and_its_end(cuda):
    captured_step.cuda_graph(lambda: cuda.append("step"))()
    assert cuda == ["begin {'capture_error_mode': 'thread_local'}", "step", "end", "replay"]


def test_what_fails_in_a_capture_is_raised_with_the_switch_that_avoids_it(cuda):
    def fail():
        cuda.append("failed")
        raise ValueError("the device was waited for")

    with pytest.raises(ValueError, match="waited for") as caught:
        captured_step.cuda_graph(fail)
    assert "GEMMA2_CUDA_GRAPHS=0" in caught.value.__notes__[0]


def test_graphs_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("GEMMA2_CUDA_GRAPHS", "0")
    assert capture_on(torch.device("cuda")) is None


def test_only_cuda_captures():
    assert capture_on(torch.device("cuda")) is captured_step.cuda_graph
    assert [capture_on(torch.device(name)) for name in ("cpu", "mps", "xpu")] == [None] * 3
    assert [sampler.fixed_shapes(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [False, True, True]
