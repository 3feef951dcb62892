"""Secrets of the environment, of addresses and of recipes appear in no byte that a command writes or prints."""

from __future__ import annotations

import json

import pytest
from chat_server import Server, refuse, reply, serving
from every_command import EVERY, git_with_remote, run_all, split, write_inputs
from ledger import recorded
from planted_secrets import SECRETS, environment, found_in, search

pytest.importorskip("openai")

KEYS = (SECRETS["OPENAI_API_KEY"], SECRETS["JUDGE_KEY"])


def echoing(number, body):
    """Faults that repeat the key, as some proxies do: in the error, its code, the name of the model, the reason."""
    keys = " and ".join(KEYS)
    answer = {"index": 0, "message": {"role": "assistant", "content": "Score: 7"}, "finish_reason": "stop"}
    whole = {"id": "x", "object": "chat.completion", "model": f"m-{KEYS[0]}-{KEYS[1]}", "choices": [answer]}
    loud = {**answer, "message": {"role": "assistant", "content": f"Your key is {keys}. Score: 7"}}
    documents = {
        0: {"error": {"message": f"Incorrect key {keys}", "code": 503}},
        1: whole,
        2: {**whole, "choices": [{**answer, "finish_reason": f"because {keys}"}]},
        3: {**whole, "choices": [loud]},
        4: {**whole, "usage": {"prompt_tokens": keys}, "model": "m"},
        5: {"choices": keys},
    }
    if number % 8 == 6:
        return refuse(500, f"no such key: {keys}", headers=[("X-Key", KEYS[0])])
    if number % 8 == 7:
        return lambda handler, _: reply(handler, 429, {"error": f"Bearer {keys}"})
    return lambda handler, _: reply(handler, 200, documents[number % 8])


def refusing(number, body):
    return refuse(401, f"Incorrect API key provided: {' or '.join(KEYS)}", code=KEYS[0])


SERVED = ["--prompts", "rows.jsonl", "--limit", "8", "--concurrency", "1"]


def served(name: str, address: str) -> list[list[str]]:
    """Commands that ask a server, by keys of the environment."""
    asked = ["--engine", "openai", "--base-url", address, "--retries", "6"]
    judge = ["--judge", "openai:m", "--judge-url", address, "--judge-key-env", "JUDGE_KEY", "--judge-concurrency", "1"]
    pairs = ["reward", "pairs", "--model", "a", "--prompts", "rows.jsonl", "--limit", "3", "--max-new-tokens", "4"]
    return [
        ["generate", "--teacher", "m", *SERVED, *asked, "--out", f"out/{name}-answers"],
        ["generate", "--teacher", "m", *SERVED, *asked, "--json", "--out", f"out/{name}-json"],
        ["generate", "--teacher", "m", *SERVED, *asked, "--api-key-env", "JUDGE_KEY", "--out", f"out/{name}-judge"],
        [*pairs, *judge, "--select", "all", "--n", "3", "--out", f"out/{name}-pairs"],
    ]


def refused(address: str) -> list[list[str]]:
    """Command lines with secrets in the wrong places: each ends in one line that does not repeat them."""
    host = address.removeprefix("http://")
    asked = ["generate", "--teacher", "m", "--engine", "openai", *SERVED, "--out", "out/refused"]
    key = SECRETS["--set"]
    addresses = [
        f"http://me:{SECRETS['user of an address']}@{host}",
        f"{address}?key={SECRETS['query of an address']}",
        f"{address}/{SECRETS['path of an address']}",
        f"{address}#{SECRETS['fragment of an address']}",
    ]
    models = [addresses[0], f"s3://me:{SECRETS['user of an address']}@bucket/x", addresses[1]]
    return [
        *([*asked, "--base-url", each] for each in addresses),
        *(
            ["reward", "pairs", "--model", "a", "--judge", "openai:m", "--judge-url", each, *SERVED[:2]]
            for each in addresses
        ),
        *(["sft", "--model", each, "--data", "rows.jsonl", "--out", "out/refused"] for each in models),
        *(["sft", "--model", "a", "--data", each, "--out", "out/refused"] for each in models),
        *(["merge", "slerp", each, "b", "--base", "a", "--out", "out/refused"] for each in models),
        *(["inspect", each] for each in models),
        ["merge", "linear", "some/model", "b", "--out", "out/refused"],
        [*asked, "--base-url", address, "--set", f"request.api_key={key}"],
        [*asked, "--base-url", address, "--set", f"request.extra.Authorization=Bearer {key}"],
        [*asked, "--base-url", address, "--set", f"request.user={SECRETS['OPENAI_API_KEY']}"],
        [*asked, "--base-url", address, "--set", f"api_key={key}"],
        [*asked, "--base-url", address, "--api-key", key],
        [*asked, "--base-url", address, f"--api-key={key}"],
        [*asked, "--base-url", address, "--api-key-env", key],
        ["sft", "--model", "a", "--data", "rows.jsonl", "--set", f"trainer.hub_token={key}", "--out", "out/refused"],
        ["sft", "--model", "a", "--data", "rows.jsonl", "--set", f"hf_token={key}", "--out", "out/refused"],
        *(["generate", "--config", f"bad-{n}.yaml", "--out", "out/refused"] for n in range(3)),
        ["pipeline", "run", "bad-pipeline.yaml", "--out", "out/refused"],
    ]


def write_recipes(folder, address):
    """Recipes with a key in them."""
    key = SECRETS["a recipe"]
    plain = {"teacher": "m", "prompts": "rows.jsonl", "engine": "openai", "base_url": address}
    (folder / "bad-0.yaml").write_text(json.dumps(plain | {"api_key": key}))
    (folder / "bad-1.yaml").write_text(json.dumps(plain | {"request": {"api_key": key}}))
    (folder / "bad-2.yaml").write_text(f"teacher: m\napi_key: {key}: x\n  - [")
    stage = {"command": "generate", "options": plain | {"request": {"password": key}}}
    (folder / "bad-pipeline.yaml").write_text(json.dumps({"stages": {"one": stage}}))


def printed_of(text: str) -> set[str]:
    return set(found_in(text.encode()))


@pytest.mark.torture
def test_no_command_writes_a_secret(tmp_path):
    with recorded("secrets planted in environment, addresses, recipes and servers' answers, all commands") as figures:
        folder = write_inputs(tmp_path / "work")
        git_with_remote(folder, f"https://me:{SECRETS['git remote']}@example.com/x.git")
        loud, no = Server(echoing), Server(refusing)
        with serving(loud) as first, serving(no) as second:
            write_recipes(folder, first)
            asked = [*served("loud", first), *served("refused", second)]
            good, bad = split(EVERY), refused(first)
            codes, printed = run_all([*good, *asked, *bad], folder, tmp_path / "home", environment())
        found, files, size = search(folder / "out")
        cached, more, further = search(tmp_path / "home")
        assert (found, cached, printed_of(printed)) == ([], [], set())
        assert codes[: len(good)] == [0] * len(good), printed
        assert loud.requests and no.requests and "Traceback" not in printed
        accepted = [
            words for words, code in zip(bad, codes[len(good) + len(asked) :], strict=True) if code not in (1, 2)
        ]
        assert accepted == []
        figures |= {"secrets": len(SECRETS), "commands": len(codes), "files": files + more, "bytes": size + further}
        figures["found"] = 0
