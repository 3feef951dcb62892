"""What every engine owes its caller, checked on all of them: our sampler, vLLM (a stand-in) and a server."""

from __future__ import annotations

import json
import sys

import fake_vllm
import pytest
from chat_server import KEY, Server, serving
from teachers import save_stopping
from waiting import pause

from gemma2.core.errors import UsageError
from gemma2.core.progress import SILENT
from gemma2.posttrain.data.sources import iter_rows, to_line
from gemma2.posttrain.generation.engines import Completion, Request, load_engine, local
from gemma2.posttrain.generation.generate import run_generate
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import GenerateConfig

ENGINES = ("transformers", "vllm", "openai")
LIMIT = 24


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "teacher"
    save_stopping(folder)
    return folder


@pytest.fixture(params=ENGINES)
def configure(request, teacher, monkeypatch):
    """Makes configurations of one engine; the server answers out of order."""
    monkeypatch.setattr(local, "BATCHES", 2)
    prompts = teacher.parent / "prompts.jsonl"
    rows = [{"prompt": f"What is {i}?" + " please" * (i % 3), "id": i} for i in range(6)]
    prompts.write_bytes(b"".join(map(to_line, rows)))
    given = {"prompts": prompts, "engine": request.param, "max_new_tokens": LIMIT, "batch_size": 3}
    if request.param == "openai":
        pytest.importorskip("openai")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with serving(Server(before=lambda body: pause(body["seed"] % 7 / 200))) as address:
            given |= {"teacher": "a/model", "base_url": address, "logprobs": True}
            yield lambda **more: GenerateConfig(**{**given, **more})
        return
    if request.param == "vllm":
        monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    yield lambda **more: GenerateConfig(**{"teacher": teacher, **given, **more})


def requests_for(engine, texts, first_seed=50):
    messages = [[{"role": "user", "content": text}] for text in texts]
    return [Request((i, 0, 0), f"p:{i}", m, engine.encode(m), first_seed + i) for i, m in enumerate(messages)]


def answers(engine, requests, known=()):
    found = [completion for group in engine.complete(requests, known) for completion in group]
    assert len({completion.key for completion in found}) == len(found)
    return {completion.key: completion for completion in found}


@pytest.fixture
def engine(configure):
    opened = load_engine(configure(), SILENT)
    yield opened
    opened.close()


def test_every_request_gets_one_completion_with_its_key_and_its_counts(engine):
    requests = requests_for(engine, ["one", "two two", "three three three", "four"])
    found = answers(engine, requests)
    assert found.keys() == {request.key for request in requests}
    for request in requests:
        answer = found[request.key]
        assert answer.finish_reason in ("stop", "length") and isinstance(answer.text, str)
        assert answer.tokens > 0 and answer.prompt_tokens > 0 and answer.logprob < 0
        assert not request.ids or answer.prompt_tokens == len(request.ids)
        assert Completion.of_record(json.loads(json.dumps(answer.record()))) == answer


def test_the_same_seed_gives_the_same_text_and_another_one_another(engine):
    texts = ["the same"] * 4
    first, again = answers(engine, requests_for(engine, texts)), answers(engine, requests_for(engine, texts))
    assert {key: answer.text for key, answer in first.items()} == {key: answer.text for key, answer in again.items()}
    assert len({answer.text for answer in first.values()}) == 4


def test_known_requests_change_nothing_for_the_others(engine):
    requests = requests_for(engine, ["one", "two two", "three three three", "four", "five", "six"])
    whole = answers(engine, requests)
    rest = answers(engine, requests, known={(0, 0, 0), (3, 0, 0)})
    assert {(1, 0, 0), (2, 0, 0), (4, 0, 0), (5, 0, 0)} <= rest.keys()
    assert all(rest[key] == whole[key] for key in rest)
    assert answers(engine, requests, known=set(whole)) == {}


def test_a_chunk_is_at_least_one_request(engine):
    assert engine.chunk >= 1 and list(engine.complete([], ())) == []


def test_an_answer_ends_before_the_first_of_the_stop_strings(configure):
    texts = ["one", "two two", "three three three", "four"]
    plain, other = load_engine(configure(), SILENT), None
    try:
        requests = requests_for(plain, texts)
        whole = answers(plain, requests)
        middles = [(answer.text, len(answer.text) // 2) for answer in whole.values()]
        stops = tuple(sorted({text[at : at + 2].strip() for text, at in middles[:2]} - {""}))
        assert stops
        other = load_engine(configure(stop=stops), SILENT)
        for key, answer in answers(other, requests).items():
            before = min((whole[key].text.partition(stop)[0] for stop in stops), key=len)
            assert answer.text == before.strip()
            cut = before != whole[key].text
            assert answer.finish_reason == ("stop" if cut else whole[key].finish_reason)
            assert not (cut and answer.ids), "ids that were drawn hold the stop string"
            assert answer.tokens <= whole[key].tokens
        assert any(answer.text != whole[key].text for key, answer in answers(other, requests).items())
    finally:
        plain.close()
        if other is not None:
            other.close()


def test_min_p_of_one_is_greedy(configure):
    config = configure(min_p=1.0)
    if config.engine == "openai":
        return  # the server's business: test_server.py sees it arrive
    engine, greedy = load_engine(config, SILENT), load_engine(configure(temperature=0.0), SILENT)
    requests = requests_for(engine, ["one", "two two", "three"])
    assert [a.text for _, a in sorted(answers(engine, requests).items())] == [
        a.text for _, a in sorted(answers(greedy, requests).items())
    ]


@pytest.mark.parametrize("turns", [1, 2])
def test_rows_come_in_input_order_with_their_provenance(configure, tmp_path, turns):
    config = configure(n=2, turns=turns, keep_truncated=True, seed=3, temperature=1.5, top_p=0.9, top_k=40)
    rows = [row.columns for row in iter_rows(run_generate(config, RunOptions(tmp_path / "out")).out)]
    assert [(row["id"], row["sample"]) for row in rows] == [(i, k) for i in range(6) for k in range(2)]
    assert {"finish_reason", "tokens", "prompt_tokens", "logprob", "seed"} <= rows[0].keys()
    assert {(row["temperature"], row["top_p"], row["top_k"]) for row in rows} == {(1.5, 0.9, 40)}
    assert {row["teacher"] for row in rows} == {"a/model" if config.engine == "openai" else "teacher"}
    assert len({row["seed"] for row in rows}) == 12
    for row in rows:
        messages = row["messages"] if turns > 1 else row["prompt"] + row["completion"]
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert turns == 1 or row["turns"] == len(roles) // 2
    assert turns == 1 or max(row["turns"] for row in rows) == turns
    again = run_generate(config, RunOptions(tmp_path / "again"))
    assert [row.columns for row in iter_rows(again.out)] == rows


def test_a_run_that_was_interrupted_goes_on_and_ends_alike(configure, tmp_path, interrupting):
    config = configure(n=2, turns=2, keep_truncated=True)
    if config.engine == "openai":
        config = configure(n=2, turns=2, keep_truncated=True, concurrency=2)
    whole = run_generate(config, RunOptions(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run_generate(config, RunOptions(tmp_path / "out"), interrupting(6 + 20))
    resumed = run_generate(config, RunOptions(tmp_path / "out", resume=True))
    rows = [[row.columns for row in iter_rows(result.out)] for result in (whole, resumed)]
    assert rows[0] == rows[1] and whole.summary == resumed.summary


@pytest.mark.parametrize("package", ["vllm", "openai"])
def test_a_missing_package_is_named_with_its_extra(package, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    config = GenerateConfig(teacher=teacher, prompts=teacher, engine=package)
    with pytest.raises(UsageError, match=rf"--engine {package}.*gemma2\[{package}\]"):
        load_engine(config, SILENT)


def test_what_vllm_aborts_is_not_an_answer(teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    drawn = fake_vllm.LLM._drawn

    def ending(self, *given):
        output = drawn(self, *given)
        output.finish_reason, output.cumulative_logprob = reasons.pop(0), float("nan")
        return output

    monkeypatch.setattr(fake_vllm.LLM, "_drawn", ending)
    engine = load_engine(GenerateConfig(teacher=teacher, prompts=teacher, engine="vllm"), SILENT)
    reasons = ["abort", "error", None, "length"]
    found = answers(engine, requests_for(engine, ["a", "b", "c", "d"]))
    assert [answer.finish_reason for _, answer in sorted(found.items())] == ["abort", "error", "unknown", "length"]
    assert {answer.logprob for answer in found.values()} == {None}


def test_vllm_gets_token_ids_one_seed_each_and_all_stop_ids(teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    config = GenerateConfig(teacher=teacher, prompts=teacher, engine="vllm", max_new_tokens=9, temperature=0.5)
    engine = load_engine(config, SILENT)
    answers(engine, requests_for(engine, ["a", "b"]))
    one, two = fake_vllm.LLM.calls[-1]
    assert (one.seed, two.seed) == (50, 51) and set(one.stop_token_ids) == {1, 107}
    assert (one.max_tokens, one.temperature, one.top_p, one.top_k, one.min_p) == (9, 0.5, 1.0, -1, 0.0)
    assert one.stop is None and one.detokenize is False
    assert engine.window == engine.llm.llm_engine.model_config.max_model_len - 9
    assert engine.facts() == {"vllm": "0.10.2"}
