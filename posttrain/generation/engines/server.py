"""Any OpenAI-compatible server as an engine: bounded concurrency, retries, rate limits, the key from the environment.

`POST {base_url}/chat/completions`, one request per completion, so that each has its own seed. Answers come in any
order and are handed on as they arrive. Tried again: 408, 409, 429, 5xx, time-outs, broken connections, and answers
that are not JSON or hold no choice. Everything else (a wrong key, an unknown model, a refused parameter) ends the run
with one line, after the requests in flight have been answered and handed on, since they are paid.

The key is read from the environment when the engine opens. It is in no record, and cut out of what a server says.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Container, Iterator, Sequence
from typing import Any

from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import Progress
from gemma2.posttrain.schemas.fields import check_address
from gemma2.posttrain.schemas.generate import GenerateConfig

from .base import Completion, Key, Message, Request
from .retry import Backoff, retry_after

__all__ = ["ServerEngine"]

WAVES = 64  # requests given at once, as a multiple of those in flight: the last ones of a chunk leave slots empty
AGAIN = (408, 409, 425, 429)  # and 5xx
NOT_AGAIN = ("insufficient_quota", "billing_hard_limit_reached")  # 429s that waiting does not fix
TOO_LONG = ("context_length_exceeded", "maximum context length", "context size", "context window", "too many tokens")
FILTERED = "content_filter"  # also the code of a prompt that a server's filter does not let through
LONG_WAIT = 20.0  # seconds of a pause that is shown to the user
FIRST_CONTACT = 2  # further attempts to reach a server that never answered: more likely the address is wrong


class _Failed(Exception):
    """An attempt that may succeed when it is made again. `pause`: what the server asks for, seconds."""

    def __init__(self, why: str, pause: float | None = None, connected: bool = True) -> None:
        super().__init__(why)
        self.pause = pause
        self.connected = connected


class ServerEngine:
    """A client of one server and one model."""

    chat = None
    window = None

    def __init__(self, config: GenerateConfig, progress: Progress) -> None:
        try:
            import openai
        except ImportError as error:
            raise UsageError(f"--engine openai: {error}", "pip install 'gemma2[openai]'") from error
        self.config = config
        self.progress = progress
        self.key = _key(config)
        self.client = openai.AsyncOpenAI(
            api_key=self.key or "none", base_url=config.base_url, timeout=config.timeout, max_retries=0
        )
        self.address = str(self.client.base_url).rstrip("/")
        try:
            check_address(self.address)  # it may come from OPENAI_BASE_URL
        except ValueError as error:
            raise UsageError(f"the server's address: {error}", "see --base-url and OPENAI_BASE_URL") from error
        self.chunk = WAVES * config.concurrency
        self.backoff = Backoff()
        self.runner = asyncio.Runner()
        self.failure: InputError | None = None
        self.reached = False
        self.told_until = 0.0  # on the monotonic clock: the pause that the user knows of

    def encode(self, messages: list[Message]) -> list[int]:
        """Nothing: the server tokenises."""
        return []

    def complete(self, requests: Sequence[Request], known: Container[Key]) -> Iterator[list[Completion]]:
        """Groups of whatever has been answered since the last one. Raises InputError after what is in flight."""
        waiting = deque(request for request in requests if request.key not in known)
        flying: set[asyncio.Task[Completion]] = set()
        loop = self.runner.get_loop()
        try:
            while flying or (waiting and self.failure is None):
                while waiting and len(flying) < self.config.concurrency and self.failure is None:
                    flying.add(loop.create_task(self._answer(waiting.popleft())))
                done, flying = self.runner.run(_first(flying))
                answered = [task.result() for task in done if task.exception() is None]
                for task in done:
                    self._note_failure(task.exception())
                if answered:
                    yield answered
            if self.failure is not None:
                raise self.failure
        finally:
            self.runner.run(_cancel(flying))

    def _note_failure(self, error: BaseException | None) -> None:
        if isinstance(error, InputError):
            self.failure = self.failure or error
        elif error is not None:
            raise error

    async def _answer(self, request: Request) -> Completion:
        """One completion, with as many attempts as it takes and the configuration allows."""
        failures = 0
        while True:
            await self.backoff.turn()
            try:
                return await self._attempt(request)
            except _Failed as failed:
                failures += 1
                lost = not (failed.connected or self.reached)
                allowed = min(self.config.retries, FIRST_CONTACT) if lost else self.config.retries
                if failures > allowed or self.failure is not None:
                    what = f"{request.where}: no answer from {self.address} in {failures} attempts, at last: {failed}"
                    hint = "check --base-url" if lost else "the answers so far are kept: continue with --resume"
                    raise InputError(what, hint) from failed
                await self._pause(failed, failures)

    async def _pause(self, failed: _Failed, failures: int) -> None:
        delay = self.backoff.delay(failures)
        if failed.pause is not None:
            self.backoff.hold(failed.pause)
        longest, clock = max(failed.pause or 0.0, delay), time.monotonic()
        if longest > LONG_WAIT and clock > self.told_until:
            self.told_until = clock + longest
            self.progress.note(f"{self.address}: {failed}; going on in {longest:.0f} s")
        await asyncio.sleep(delay)

    async def _attempt(self, request: Request) -> Completion:
        import openai

        try:
            response = await self.client.chat.completions.with_raw_response.create(**self._arguments(request))
            self.reached = True
            return self._completion(request, json.loads(response.text))
        except openai.APIStatusError as error:
            return self._refused(request, error)
        except openai.APIConnectionError as error:  # time-outs among them
            why = self._redacted(f"{type(error).__name__}: {error.__cause__ or error}")
            raise _Failed(why, connected=False) from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Failed(f"an answer that is not a completion ({type(error).__name__}: {error})") from error

    def _arguments(self, request: Request) -> JsonObject:
        config = self.config
        body: JsonObject = {
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p if config.top_p < 1 else None,
            "top_k": config.top_k or None,
            "seed": request.seed,
            "logprobs": config.logprobs or None,
            **config.request,
        }
        fields = {name: value for name, value in body.items() if value is not None}
        return {"model": str(config.teacher), "messages": request.messages, "extra_body": fields}

    def _completion(self, request: Request, body: JsonObject) -> Completion:
        (choice,) = body["choices"]
        usage = body.get("usage") or {}
        logprobs = (choice.get("logprobs") or {}).get("content")
        reason = choice.get("finish_reason")
        return Completion(
            key=request.key,
            text=(choice["message"].get("content") or "").strip(),
            finish_reason=reason if reason in ("length", "content_filter") else "stop",
            tokens=usage.get("completion_tokens"),
            prompt_tokens=usage.get("prompt_tokens"),
            logprob=None if logprobs is None else round(sum(item["logprob"] for item in logprobs), 4),
        )

    def _refused(self, request: Request, error: Any) -> Completion:  # noqa: ANN401
        """The meaning of an error status: an overlong prompt, another attempt, or the end."""
        self.reached = True
        status, said = error.status_code, self._said(error)
        lasting = any(mark in said for mark in NOT_AGAIN)
        if status == 400 and FILTERED in said:
            return Completion(request.key, "", FILTERED, 0)
        if (status in AGAIN or status >= 500) and not lasting:
            raise _Failed(f"{status} {said}", retry_after(error.response.headers)) from error
        if status in (400, 413, 422) and any(mark in said.lower() for mark in TOO_LONG):
            if self.config.on_overlong == "drop":
                return Completion.overlong(request.key)
            raise InputError(
                f"{request.where}: too long for {self.config.teacher}: {said}",
                "shorten it, lower --max-new-tokens, or --on-overlong drop",
            ) from error
        hints = {
            401: f"check the key in {self.config.api_key_env}",
            403: f"check what the key in {self.config.api_key_env} may do",
            404: "check --teacher and --base-url",
            429: "the account is out of credit",
        }
        raise InputError(
            f"{self.address} refuses {self.config.teacher}: {status} {said}",
            hints.get(status, "check model and settings; --set request.NAME=VALUE sets a field, null drops one"),
        ) from error

    def _said(self, error: Any) -> str:  # noqa: ANN401
        """The message of the server, in one short line without the key."""
        body = error.body
        detail = body.get("message", body) if isinstance(body, dict) else body
        code = f" ({body['code']})" if isinstance(body, dict) and isinstance(body.get("code"), str) else ""
        text = " ".join(str(detail or error.message).split())[:300] + code
        return self._redacted(text)

    def _redacted(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def facts(self) -> JsonObject:
        """The origin of the answers."""
        return {"server": self.address}

    def close(self) -> None:
        """Close the connections."""
        self.runner.run(self.client.close())
        self.runner.close()


def _key(config: GenerateConfig) -> str | None:
    """The key; a server of one's own (--base-url) may do without."""
    key = os.environ.get(config.api_key_env, "").strip()  # a newline would be refused as a header, and quoted
    if not key and (config.base_url is None or config.api_key_env != "OPENAI_API_KEY"):
        # A key of letters, figures and underscores could be a name too; names are written in capitals, keys are not.
        if config.api_key_env != config.api_key_env.upper():
            raise UsageError(
                "the environment variable for the key holds none", "give its name with --api-key-env, not the key"
            )
        raise UsageError(
            f"the environment variable {config.api_key_env} holds no key",
            "export it, or give the --base-url of a server that needs none",
        )
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"the key in {config.api_key_env} holds characters that no key has", "export it again")
    return key or None


async def _first(
    tasks: set[asyncio.Task[Completion]],
) -> tuple[set[asyncio.Task[Completion]], set[asyncio.Task[Completion]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _cancel(tasks: set[asyncio.Task[Completion]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
