"""A server that answers badly in every way of `bad_answers.py`: one prompt always, one prompt once, all prompts.

Whatever it sends, there is no traceback, the exit code is right, what was answered is not asked for again, and a resume
ends the run once the server is well.
"""

from __future__ import annotations

import functools
import json
import ssl

import pytest
from bad_answers import CASES, DRIP
from chat_server import KEY, Server, serving
from processes import ROOT

from gemma2.core.errors import Gemma2Error, GuardStop, InputError
from gemma2.core.outputs.staging import partial_path
from gemma2.posttrain.data.sources import iter_rows, to_line
from gemma2.posttrain.generation.engines import Completion, retry, server
from gemma2.posttrain.generation.generate import run_generate
from gemma2.posttrain.generation.journal import Journal
from gemma2.posttrain.provenance import version_rule
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import GenerateConfig

pytest.importorskip("openai")

PROMPTS = 3
BAD = "prompt 1"  # the first prompt is answered, so the server is known to be one
RETRIES = 1


# The same for every run, and most of its time: the versions of the packages, and the certificates of a TLS client.
known_versions = functools.cache(version_rule.versions)
one_context = functools.cache(ssl.create_default_context)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(ssl, "create_default_context", one_context)
    monkeypatch.setattr(version_rule, "versions", known_versions)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(retry, "FIRST", 0.001)
    monkeypatch.setattr(server, "MOST_BYTES", 2**20)


@pytest.fixture
def job(tmp_path, interrupting):
    """Runs the job against a server with these faults; gives the result or the error, and checks what it left."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"".join(to_line({"prompt": f"prompt {i}"}) for i in range(PROMPTS)))
    out = tmp_path / "out"
    fake = Server()
    with serving(fake) as address:

        def run(faults, slow=False, **options):
            fake.faults = faults
            config = GenerateConfig(
                teacher="a/model",
                prompts=prompts,
                engine="openai",
                base_url=address,
                concurrency=1,
                retries=RETRIES,
                timeout=DRIP if slow else 300.0,
            )
            try:
                return run_generate(config, RunOptions(out, **options), interrupting())
            except Gemma2Error as error:
                assert str(error).isprintable() and KEY not in str(error)
                return error
            finally:
                journal = partial_path(out) / "checkpoints" / "answers.jsonl"
                if journal.exists():
                    check_journal(journal)

        run.fake, run.out = fake, out
        yield run


def check_journal(path):
    """Every record can be read, and holds what the schema allows."""
    with Journal(path) as journal:
        for record in map(Completion.of_record, journal.records()):
            record.text.encode()
            check_figures(record.tokens, record.prompt_tokens, record.logprob)


def check_figures(tokens, prompt_tokens, logprob):
    for count in (tokens, prompt_tokens):
        assert count is None or (type(count) is int and count >= 0)
    assert logprob is None or -1e9 < logprob <= 1


def asked(fake):
    """How often each prompt was asked for."""
    texts = [body["messages"][-1]["content"] for _, _, body in fake.requests]
    return [texts.count(f"prompt {i}") for i in range(PROMPTS)]


def texts(out):
    return [row.columns["prompt"][0]["content"] for row in iter_rows(out)]


def always(case):
    return lambda number, body: case.fault if body["messages"][-1]["content"] == BAD else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_prompt_that_is_always_answered_badly(job, case):
    result = job(always(case), case.slow)
    if case.fate == "keep":
        assert len(texts(job.out)) == PROMPTS and asked(job.fake) == [1, 1, 1] and "dropped" not in result.summary
        for row in iter_rows(job.out):
            check_figures(row.columns["tokens"], row.columns["prompt_tokens"], row.columns["logprob"])
    elif case.fate in ("drop", "again"):
        assert texts(job.out) == ["prompt 0", "prompt 2"] and result.summary["dropped"] == {case.reason: 1}
        assert asked(job.fake) == [1, 1 if case.fate == "drop" else 1 + RETRIES, 1]
    else:
        assert isinstance(result, InputError) and result.exit_code == 1
        assert (f"no whole answer in {DRIP} s" in result.what) == case.slow and result.hint
        before = asked(job.fake)
        assert before[0] == 1 and before[2] == 0
        resumed = job(lambda number, body: None, resume=True)
        assert len(texts(job.out)) == PROMPTS == resumed.summary["rows"]
        assert [now - then for now, then in zip(asked(job.fake), before, strict=True)] == [0, 1, 1]


@pytest.mark.parametrize("case", [case for case in CASES if case.fate == "again"], ids=lambda case: case.name)
def test_a_bad_answer_that_comes_once_costs_one_further_request(job, case):
    once = iter([case.fault])
    job(lambda number, body: next(once, None) if body["messages"][-1]["content"] == BAD else None, case.slow)
    assert len(texts(job.out)) == PROMPTS and asked(job.fake) == [1, 2, 1]


@pytest.mark.parametrize("case", [case for case in CASES if case.fate != "keep"], ids=lambda case: case.name)
def test_all_prompts_answered_badly(job, case):
    result = job(lambda number, body: case.fault, case.slow)
    assert not job.out.exists()
    never_answered = case.fate == "end" or case.reason in ("malformed", "refused")
    assert result.exit_code == (1 if never_answered else 3)
    if never_answered:  # nothing is kept, so nothing is to be resumed: the same command again ends the run
        assert isinstance(result, InputError)
        assert len(texts(job(lambda number, body: None).out)) == PROMPTS
    else:
        assert isinstance(result, GuardStop) and f"3 {case.reason}" in result.what.replace("\\\\", "\\")
        paid = asked(job.fake)
        again = job(lambda number, body: None, resume=True)
        assert isinstance(again, GuardStop) and asked(job.fake) == paid
        assert "--force" in result.hint and len(texts(job(lambda number, body: None, force=True).out)) == PROMPTS


def test_there_are_enough_cases():
    assert len(CASES) >= 40 and len({case.name for case in CASES}) == len(CASES)


def test_a_count_that_can_be_read_is_kept_and_one_that_cannot_is_null(job):
    cases = {case.name: case.fault for case in CASES}
    job(lambda number, body: cases["token counts as text"] if body["messages"][-1]["content"] == BAD else None)
    rows = [json.loads(line) for line in next(job.out.glob("data-*.jsonl")).read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [7, None, 7]


def test_the_page_names_every_reason_of_ours():
    page = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    ours = {case.reason for case in CASES if case.fate in ("drop", "again")}
    of_servers = {"repetition_truncation", "rows", "\\x1b[31m\\udc00"}  # any other finish reason
    assert all(f"`{reason}`" in page for reason in ours - of_servers) and of_servers < ours
