"""The default engine draws a batch as a whole or not at all, so that its bytes do not depend on what is known."""

from __future__ import annotations

import pytest
from teachers import save_stopping

from gemma2.posttrain.generation.engines import Request, local
from gemma2.posttrain.models.sampler import SamplingParams


@pytest.fixture
def engine(tmp_path):
    return local.SamplerEngine.load(save_stopping(tmp_path / "teacher"), SamplingParams(4), batch_size=3)


def test_a_batch_of_which_a_part_is_known_is_drawn_in_the_same_company(engine, monkeypatch):
    lengths = [3, 9, 4, 8, 5, 7]
    requests = [Request((i, 0, 0), "p", [], list(range(3, 3 + n)), i) for i, n in enumerate(lengths)]
    batches, decode = [], local.decode

    def spy(model, prompts, *more):
        batches.append([len(prompt) for prompt in prompts])
        return decode(model, prompts, *more)

    monkeypatch.setattr(local, "decode", spy)
    assert len(list(engine.complete(requests, ()))) == 2
    assert len(list(engine.complete(requests, {(1, 0, 0), (3, 0, 0)}))) == 2
    assert len(list(engine.complete(requests, {(1, 0, 0), (3, 0, 0), (5, 0, 0)}))) == 1
    assert batches == [[9, 8, 7], [5, 4, 3]] * 2 + [[5, 4, 3]]
