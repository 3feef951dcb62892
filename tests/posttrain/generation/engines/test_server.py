"""The server engine against a real HTTP server: retries, rate limits, refusals, order, concurrency, the key."""

from __future__ import annotations

import asyncio
import email.utils
import threading
from types import SimpleNamespace

import pytest
from asking import ask, requests_of
from chat_server import KEY, Server, cut_short, hang, refuse, reset, serving, text
from waiting import PATIENCE, wait_for

from gemma2.core.errors import InputError
from gemma2.core.progress import SILENT
from gemma2.posttrain.generation.engines import retry, server
from gemma2.posttrain.generation.engines.retry import Backoff, retry_after
from gemma2.posttrain.schemas import GenerateConfig

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(retry, "FIRST", 0.005)


def first(count, fault):
    """`fault` for the first requests, then right answers."""
    return lambda number, body: fault if number < count else None


def test_a_request_carries_prompt_settings_and_seed_and_the_answer_its_counts():
    fake = Server()
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_new_tokens": 50, "logprobs": True}
    found = ask(fake, 2, **given, stop=("\n\n", "a, b"))
    _, headers, body = fake.requests[0]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "a/model",
        "messages": [{"role": "user", "content": f"prompt {body['seed'] - 100}"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "stop": ["\n\n", "a, b"],
        "max_tokens": 50,
        "seed": body["seed"],
        "logprobs": True,
    }
    answer = found[1, 0, 0]
    assert (answer.text, answer.finish_reason) == ("You said: prompt 1 (101)", "stop")
    assert (answer.tokens, answer.prompt_tokens, answer.logprob) == (7, 8, -0.75)


def test_defaults_send_no_field_that_a_plain_server_may_not_know():
    fake = Server()
    ask(fake, 1)
    assert fake.requests[0][2].keys() == {"model", "messages", "temperature", "max_tokens", "seed"}


def test_fields_of_the_request_can_be_added_and_taken_out():
    fake = Server()
    ask(fake, 1, request={"temperature": None, "reasoning_effort": "low"})
    assert "temperature" not in fake.requests[0][2] and fake.requests[0][2]["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    "fault",
    [
        refuse(500, "oops"),
        refuse(503, "busy"),
        refuse(408),
        refuse(429, "slow down"),
        text(b'{"choices": [{"mess'),
        text(b""),
        text({"choices": []}),
        text({"choices": [{"message": None}]}),
        text([]),
        cut_short,
        reset,
    ],
    ids=["500", "503", "408", "429", "torn JSON", "empty", "no choice", "no message", "a list", "cut", "reset"],
)
def test_what_may_pass_is_tried_again(fault):
    fake = Server(first(3, fault))
    found = ask(fake, 3)
    assert len(found) == 3 and all(answer.finish_reason == "stop" for answer in found.values())
    assert len(fake.requests) == 6 and sorted(fake.seeds[3:]) == sorted(set(fake.seeds))


def test_a_request_that_hangs_is_given_up_after_the_timeout_and_made_again():
    released = threading.Event()
    fake = Server(first(1, hang(released)))
    try:
        # A busy machine may take longer than the timeout for the other attempts too, so many are allowed.
        assert len(ask(fake, 1, timeout=0.5, retries=100)) == 1
    finally:
        released.set()
    assert len(fake.requests) >= 2


def test_the_timeout_of_a_request_is_the_one_that_was_asked_for():
    given = {"teacher": "m", "prompts": "p", "engine": "openai", "base_url": "http://127.0.0.1:9/v1", "timeout": 7.5}
    engine = server.ServerEngine(GenerateConfig(**given), SILENT)
    assert (engine.client.timeout.read, engine.client.timeout.connect) == (7.5, 7.5)
    engine.close()


class Clock:
    """In place of `time` and of `asyncio.sleep`: sleeping is what moves it."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds
        await asyncio.sleep(0)


def test_retry_after_is_honoured_and_holds_back_every_request(monkeypatch):
    """On a clock that only the pauses move. The first of two requests is refused while the second waits."""
    clock, held, both, sent = Clock(), threading.Event(), threading.Event(), []
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(retry, "asyncio", clock)
    hold = Backoff.hold
    monkeypatch.setattr(Backoff, "hold", lambda self, seconds: (hold(self, seconds), held.set()))

    def faults(number, body):
        sent.append(clock.now - 1000.0)
        if number == 0:
            assert both.wait(PATIENCE)
            return refuse(429, headers=[("Retry-After", "40")])
        if number == 1:
            both.set()
            assert held.wait(PATIENCE)
        return None

    ask(Server(faults), 6, concurrency=2)
    assert len(sent) == 7 and sent[:2] == [0, 0]
    assert min(sent[2:]) >= 40


@pytest.mark.parametrize("value", ["nan", "", "Mon, 99 Foo 99999 1:1:1", "\x00"])
def test_a_pause_that_cannot_be_read_is_not_given(value):
    assert retry_after({"retry-after": value}) is None


def test_a_server_that_was_never_reached_is_given_up_soon():
    given = {"teacher": "m", "prompts": "p", "engine": "openai", "base_url": "http://127.0.0.1:9/v1", "retries": 50}
    engine = server.ServerEngine(GenerateConfig(**given), SILENT)
    with pytest.raises(InputError, match=r"in 3 attempts, at last: APIConnectionError.*; check --base-url"):
        list(engine.complete(requests_of(1), ()))
    engine.close()


def test_a_server_that_is_gone_for_a_while_is_waited_for():
    fake = Server(lambda number, body: reset if 1 <= number < 6 else None)
    assert len(ask(fake, 3, concurrency=1)) == 3 and len(fake.requests) == 8


def test_retries_have_an_end_that_names_row_server_and_cause():
    fake = Server(lambda number, body: refuse(503, "overloaded"))
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: no answer from http.* in 3 attempts, at last: 503 overlo"):
        ask(fake, 1, retries=2)
    assert len(fake.requests) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            refuse(401, f"Incorrect API key provided: {KEY}"),
            r"401 Incorrect API key provided: \*\*\*; check the",
        ),
        (refuse(403, "not yours"), "403 not yours; check what the key in OPENAI_API_KEY may do"),
        (refuse(404, "The model `a/model` does not exist"), "404 The model `a/model` does not exist; check --teacher"),
        (refuse(400, "Unsupported parameter: 'temperature'"), "400 Unsupported .*--set request.NAME=VALUE"),
        (refuse(429, "You exceeded your quota", code="insufficient_quota"), "insufficient_quota.*out of credit"),
    ],
    ids=["401", "403", "404", "400", "quota"],
)
def test_what_no_retry_mends_ends_at_once_in_one_line_without_the_key(fault, words):
    fake = Server(lambda number, body: fault)
    with pytest.raises(InputError, match=words) as raised:
        ask(fake, 20, concurrency=2)
    assert KEY not in str(raised.value) and "\n" not in str(raised.value)
    assert len(fake.requests) <= 3


def test_answers_in_flight_are_handed_on_before_a_refusal_ends_the_run():
    """They are paid. The others are answered once the refusal has arrived."""
    fake = Server(
        lambda number, body: refuse(400) if body["seed"] == 100 else None,
        before=lambda body: body["seed"] == 100 or wait_for(lambda: engine.failure),
    )
    found = []
    with serving(fake) as address:
        config = GenerateConfig(teacher="m", prompts="p", engine="openai", base_url=address, concurrency=3)
        engine = server.ServerEngine(config, SILENT)
        with pytest.raises(InputError, match="400"):
            for group in engine.complete(requests_of(9), ()):
                found += group
        engine.close()
    assert {completion.key for completion in found} == {(1, 0, 0), (2, 0, 0)} and len(fake.requests) == 3


def test_answers_out_of_order_keep_their_keys():
    fake = Server(before=lambda body: body["seed"] != 100 or wait_for(lambda: len(fake.answered) == 7))
    found = ask(fake, 8, concurrency=8)
    assert fake.answered[-1] == 100
    assert all(f"prompt {key[0]} " in answer.text for key, answer in found.items())


def test_no_more_requests_are_in_flight_than_allowed_and_that_many_are():
    fake = Server(before=lambda body: wait_for(lambda: fake.busiest == 5))
    ask(fake, 20, concurrency=5)
    assert fake.busiest == 5


def test_what_is_known_is_not_asked_again():
    fake = Server()
    assert ask(fake, 5, known={(1, 0, 0), (3, 0, 0)}).keys() == {(0, 0, 0), (2, 0, 0), (4, 0, 0)}
    assert sorted(fake.seeds) == [100, 102, 104]


def test_a_prompt_that_the_server_finds_too_long_is_an_error_with_its_line_or_marked():
    message = "This model's maximum context length is 8192 tokens"
    fault = refuse(400, message, code="context_length_exceeded")
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: too long for a/model: This model's maximum"):
        ask(Server(lambda number, body: fault), 1)
    fake = Server(lambda number, body: fault if body["seed"] == 101 else None)
    found = ask(fake, 3, on_overlong="drop")
    assert [found[i, 0, 0].finish_reason for i in range(3)] == ["stop", "overlong", "stop"]


def test_counts_that_a_server_does_not_give_are_unknown(monkeypatch):
    fake = Server()
    whole = fake.completion
    fake.completion = lambda body: {"choices": whole(body)["choices"]}
    (answer,) = ask(fake, 1).values()
    assert answer.tokens is None and answer.prompt_tokens is None and answer.logprob is None


def test_delays_double_up_to_a_minute_with_jitter():
    backoff = Backoff()
    for failures in range(1, 20):
        ideal = min(60.0, retry.FIRST * 2 ** (failures - 1))
        drawn = {backoff.delay(failures) for _ in range(50)}
        assert len(drawn) == 50 and all(0.5 * ideal <= delay <= 1.5 * ideal for delay in drawn)


def test_retry_after_is_read_as_seconds_milliseconds_or_a_date(monkeypatch):
    now = 1_700_000_000
    monkeypatch.setattr(retry, "time", SimpleNamespace(time=lambda: float(now)))
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert retry_after({"retry-after": email.utils.formatdate(now + 30)}) == 30
    assert retry_after({"retry-after": email.utils.formatdate(now - 30)}) == 0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None
    assert retry_after({"retry-after": "-3"}) == 0
    assert retry_after({"retry-after-ms": "soon", "retry-after": "7"}) == 7


@pytest.mark.parametrize(
    "value", ["86400", "1e300", "inf", email.utils.formatdate(4_000_000_000), "Fri, 31 Dec 9999 23:59:59 GMT"]
)
def test_a_server_that_asks_for_more_than_ten_minutes_is_asked_after_ten(value):
    assert retry_after({"retry-after": value}) == retry.LONGEST_PAUSE == 600
    assert retry_after({"retry-after-ms": "inf"}) == 600


def test_a_prompt_that_the_servers_filter_refuses_is_one_filtered_row():
    fault = refuse(400, "The prompt was filtered", code="content_filter")
    found = ask(Server(lambda number, body: fault if "prompt 1" in str(body) else None), count=3)
    assert [found[i, 0, 0].finish_reason for i in range(3)] == ["stop", "content_filter", "stop"]


def test_answers_that_came_with_a_failure_are_handed_on_whatever_the_failure_is(monkeypatch):
    """A bug keeps its traceback, after the answers in flight, which are paid."""
    fake = Server(before=lambda body: body["seed"] == 100 or wait_for(lambda: engine.failure))
    completion = server.ServerEngine._completion

    def faulty(self, request, *more):
        return 1 / 0 if request.seed == 100 else completion(self, request, *more)

    monkeypatch.setattr(server.ServerEngine, "_completion", faulty)
    found = []
    with serving(fake) as address:
        config = GenerateConfig(teacher="m", prompts="p", engine="openai", base_url=address, concurrency=3)
        engine = server.ServerEngine(config, SILENT)
        with pytest.raises(ZeroDivisionError):
            for group in engine.complete(requests_of(9), ()):
                found += group
        engine.close()
    assert {completion.key for completion in found} == {(1, 0, 0), (2, 0, 0)}


def test_a_prompt_that_is_refused_alone_is_dropped_on_resume_too():
    """The first prompt is refused before any was answered; the run ends, and goes on without it when some are known."""
    fault = refuse(400, "Invalid prompt: flagged")
    fake = Server(lambda number, body: fault if body["seed"] == 100 else None)
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: http.* refuses a/model: 400 Invalid prompt"):
        ask(fake, 3, concurrency=1)
    found = ask(fake, 3, known={(2, 0, 0)}, concurrency=1)
    assert {key: answer.finish_reason for key, answer in found.items()} == {(0, 0, 0): "refused", (1, 0, 0): "stop"}
