"""Any OpenAI-compatible server as an engine: bounded concurrency, retries, rate limits, the key from the environment.

`POST {base_url}/chat/completions`, one request per completion, so that each has its own seed. Answers come in any
order and are handed on as they arrive. What a body may hold is the table of `reply.py`.

    asked again, up to --retries    408, 409, 425, 429, 5xx, time-outs, broken connections; then the run ends
    asked again, then dropped       bodies that are not completions, answers whose reason says that the server failed
    dropped at once                 every other answer that is not `stop` or `length`, and a prompt that is refused
                                    (400, 413, 422) by a server that has answered others
    the run ends                    everything else: a wrong key, an unknown model, a refused parameter

Before the run ends, the requests in flight are answered and handed on, since they are paid. A body that cannot be read
ends the run too as long as the server has given no answer at all: the address is likely that of something else.

The key is read from the environment when the engine opens. It is in no record, and cut out of what a server says.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from gemma2.core.errors import Gemma2Error, InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.permissions import check_host, check_key, is_local
from gemma2.core.progress import Progress
from gemma2.core.secret_text import MASK, known_forms, masked
from gemma2.posttrain.schemas.fields import check_address
from gemma2.posttrain.schemas.generate import GenerateConfig

from .base import Completion, Key, Message, Request
from .http_client import HEADERS, guarded_client, http_library
from .reply import AGAIN as FAILED
from .reply import MOST_BYTES, Answer, ServerError, Unreadable, read_reply
from .retry import Backoff, retry_after
from .stops import text_completion

__all__ = ["ServerEngine"]

WAVES = 64  # requests given at once, as a multiple of those in flight: the last ones of a chunk leave slots empty
AGAIN = (408, 409, 425, 429)  # and 5xx
NOT_AGAIN = ("insufficient_quota", "billing_hard_limit_reached")  # 429s that waiting does not fix
TOO_LONG = ("context_length_exceeded", "maximum context length", "context size", "context window", "too many tokens")
FILTERED = "content_filter"  # also the code of a prompt that a server's filter does not let through
OF_A_PROMPT = (400, 413, 422)  # refusals that may be of one prompt alone
MALFORMED, REFUSED = "malformed", "refused"  # reasons of dropped completions that we give
DEFAULT_ADDRESS = "https://api.openai.com/v1"
PATH = "/chat/completions"
LONG_WAIT = 20.0  # seconds of a pause that is shown to the user
CONNECT = 30.0  # seconds until an address is taken for one that nobody answers at
FIRST_CONTACT = 2  # further attempts to reach a server that never answered: more likely the address is wrong
# What the libraries raise for hosts and ports that no address has: a server may redirect to one.
NO_ADDRESS = (ExceptionGroup, OverflowError, UnicodeError)
ENVIRONMENT = "OPENAI_BASE_URL, HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE"  # what openai's client reads there
MOST_NAMES = 20  # models, addresses, or dropped prompts that are warned of
LONGEST_MESSAGE = 300  # characters of what a server says


class _Failed(Exception):
    """An attempt that may succeed when it is made again.

    pause      what the server asks for, seconds
    connected  whether the server was reached
    dropped    the reason to drop the completion with when no attempt succeeds; empty: the run ends then
    """

    def __init__(self, why: str, pause: float | None = None, connected: bool = True, dropped: str = "") -> None:
        super().__init__(why)
        self.pause = pause
        self.connected = connected
        self.dropped = dropped


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
        address = config.base_url or os.environ.get("OPENAI_BASE_URL") or None
        try:
            if address is not None:
                check_address(address)
            if config.base_url is not None:
                check_host(config.base_url, "--base-url")
            self.client = openai.AsyncOpenAI(
                api_key=self.key or "none",
                base_url=address,
                timeout=openai.Timeout(config.timeout, connect=min(config.timeout, CONNECT)),
                max_retries=0,
                default_headers=HEADERS,
                http_client=guarded_client(address or DEFAULT_ADDRESS, MOST_BYTES),
            )
            check_address(str(self.client.base_url))
        except Gemma2Error:
            raise
        except (ValueError, OSError, ImportError, http_library().InvalidURL) as error:
            what = self._said(f"no client for the server's address: {error}")
            raise UsageError(what, f"see --base-url, and {ENVIRONMENT} in the environment") from error
        self.address = str(self.client.base_url).rstrip("/")
        if not is_local(urlsplit(self.address).hostname or ""):
            progress.note(f"prompts are sent to {self.address}")
        self.chunk = WAVES * config.concurrency
        self.backoff = Backoff()
        self.runner = asyncio.Runner()
        self.failure: BaseException | None = None
        self.reached = False
        self.understood = False  # whether the server has given an answer
        self.told_until = 0.0  # on the monotonic clock: the pause that the user knows of
        self.warned: dict[str, set[str]] = {}  # warnings that have been given, by what they are of

    def encode(self, messages: list[Message]) -> list[int]:
        """Nothing: the server tokenises."""
        return []

    def complete(self, requests: Sequence[Request], known: Container[Key]) -> Iterator[list[Completion]]:
        """Groups of whatever has been answered since the last one. Raises InputError after what is in flight."""
        waiting = deque(request for request in requests if request.key not in known)
        self.understood = self.understood or len(waiting) < len(requests)
        flying: set[asyncio.Task[Completion]] = set()
        loop = self.runner.get_loop()
        try:
            while flying or (waiting and self.failure is None):
                while waiting and len(flying) < self.config.concurrency and self.failure is None:
                    flying.add(loop.create_task(self._answer(waiting.popleft())))
                done, flying = self.runner.run(_first(flying))
                answered = [task.result() for task in done if task.exception() is None]
                for task in done:
                    self.failure = self.failure or task.exception()
                if answered:
                    yield answered
            if self.failure is not None:
                raise self.failure
        finally:
            self.runner.run(_cancel(flying))

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
                    if failed.dropped and self.understood:
                        self._warn("prompts", f"{request.where}: dropped after {failures} attempts, at last: {failed}")
                        return Completion(request.key, "", failed.dropped, 0)
                    what = f"{request.where}: no answer from {self.address} in {failures} attempts, at last: {failed}"
                    raise InputError(what, self._advice(failed, lost)) from failed
                await self._pause(failed, failures)

    def _advice(self, failed: _Failed, lost: bool) -> str:
        if lost or failed.dropped:
            return "check --base-url"
        return "start again when the server answers, or raise --timeout"

    def _warn(self, of: str, text: str) -> None:
        """One warning per text, and a bounded number of each kind: a server may have another text for every answer."""
        given = self.warned.setdefault(of, set())
        if text not in given and len(given) < MOST_NAMES:
            given.add(text)
            self.progress.warn(text)

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
            async with asyncio.timeout(self.config.timeout):  # the whole request: a server may send a byte at a time
                body, address = await self._body(request)
        except TimeoutError as error:
            raise _Failed(f"no whole answer in {self.config.timeout:g} s") from error
        except openai.APIStatusError as error:
            return self._refused(request, error.status_code, error.body, error.response.headers)
        except openai.APITimeoutError as error:
            raise _Failed(f"no answer in time ({self._cause(error)})", connected=False) from error
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, InputError):  # a redirect to another server
                raise error.__cause__ from error
            if isinstance(error.__cause__, Unreadable):
                raise self._malformed(error.__cause__) from error
            raise _Failed(self._cause(error), connected=False) from error
        except Unreadable as error:
            raise self._malformed(error) from error
        except (http_library().HTTPError, *NO_ADDRESS) as error:
            raise _Failed(self._cause(error), connected=False) from error
        self.reached = True
        try:
            return self._completion(request, read_reply(self._without_keys(body)), address)
        except ServerError as error:
            return self._refused(request, error.status, error.error, {})
        except Unreadable as error:
            raise self._malformed(error) from error

    def _without_keys(self, body: bytes) -> bytes:
        """A body in which the server does not repeat a key: an answer is recorded, and so is the name of a model."""
        for form in known_forms(self.key):
            body = body.replace(form.encode(), MASK.encode())
        return body

    def _malformed(self, error: Unreadable) -> _Failed:
        return _Failed(self._said(f"an answer that is not a completion ({error})"), dropped=MALFORMED)

    async def _body(self, request: Request) -> tuple[bytes, str]:
        """The bytes of an answer, and the address that they came from. Raises _Failed for more than `MOST_BYTES`."""
        create = self.client.chat.completions.with_streaming_response.create
        async with create(**self._arguments(request)) as response:
            parts, size = [], 0
            async for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    raise _Failed(f"an answer of more than {MOST_BYTES >> 20} MiB", dropped=MALFORMED)
            return b"".join(parts), str(response.http_response.url)

    def _cause(self, error: BaseException) -> str:
        return self._said(f"{type(error).__name__}: {error.__cause__ or error}")

    def _arguments(self, request: Request) -> JsonObject:
        config = self.config
        body: JsonObject = {
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p if config.top_p < 1 else None,
            "top_k": config.top_k if config.top_k > 0 else None,
            "min_p": config.min_p if config.min_p > 0 else None,
            "stop": list(config.stop) if config.stop else None,
            "seed": request.seed,
            "logprobs": config.logprobs or None,
            **config.request,
        }
        fields = {name: value for name, value in body.items() if value is not None}
        return {"model": str(config.teacher), "messages": request.messages, "extra_body": fields}

    def _completion(self, request: Request, answer: Answer, address: str) -> Completion:
        """What an answer is kept as. Raises _Failed for one whose reason says that the server failed."""
        self.understood = True
        for name in answer.ill_formed:
            self._warn("figures", f"{self.address} sends {name} that cannot be read; they are recorded as null")
        if answer.model is not None and answer.model != str(self.config.teacher):
            what = f"{self.address} says that it used {answer.model}, where {self.config.teacher} was asked for"
            self._warn("models", what)
        if answer.reason in FAILED:
            raise _Failed(f"the server ended the answer with {answer.reason!r}", dropped=answer.reason)
        completion = Completion(
            key=request.key,
            text=answer.text,
            finish_reason=answer.reason,
            tokens=answer.tokens,
            prompt_tokens=answer.prompt_tokens,
            logprob=answer.logprob,
            model=answer.model,
            redirect=self._redirect(address),
        )
        return text_completion(completion, self.config.stop)  # servers differ in whether they leave the string out

    def _redirect(self, address: str) -> str | None:
        """The address that answered, without what may be secret, where it is not the one that was asked."""
        parts = urlsplit(address)
        place = printable(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".removesuffix(PATH), 300)
        if place == self.address:
            return None
        self._warn("addresses", f"{self.address} leads to {place}: that server reads the prompts")
        return place

    def _refused(self, request: Request, status: int | None, body: object, headers: Mapping[str, str]) -> Completion:
        """The meaning of an error: an overlong prompt, another attempt, a prompt to drop, or the end of the run."""
        self.reached = True
        said = self._error_text(body)
        lasting = any(mark in said for mark in NOT_AGAIN)
        if status == 400 and FILTERED in said:
            return Completion(request.key, "", FILTERED, 0)
        if status is None and not lasting:
            raise _Failed(f"an error with status 200: {said}", dropped=MALFORMED)
        if status is not None and (status in AGAIN or status >= 500) and not lasting:
            raise _Failed(f"{status} {said}", retry_after(headers))
        if status in OF_A_PROMPT and any(mark in said.lower() for mark in TOO_LONG):
            if self.config.on_overlong == "drop":
                return Completion.overlong(request.key)
            raise InputError(
                f"{request.where}: too long for {self.config.teacher}: {said}",
                "shorten it, lower --max-new-tokens, or --on-overlong drop",
            )
        if status in OF_A_PROMPT and self.understood:
            self._warn("prompts", f"{request.where}: dropped, {self.address} refuses it: {status} {said}")
            return Completion(request.key, "", REFUSED, 0)
        hints = {
            401: f"check the key in {self.config.api_key_env}",
            402: "the account is out of credit",
            403: f"check what the key in {self.config.api_key_env} may do",
            404: "check --teacher and --base-url",
            429: "the account is out of credit",
        }
        where = f"{request.where}: " if status in OF_A_PROMPT else ""
        raise InputError(
            f"{where}{self.address} refuses {self.config.teacher}: {status or 'error'} {said}",
            hints.get(status or 0, "check model and settings; --set request.NAME=VALUE sets a field, null drops one"),
        )

    def _error_text(self, body: object) -> str:
        """The message of the server, in one short line without the key."""
        detail = body.get("message", body) if isinstance(body, dict) else body
        code = body.get("code") if isinstance(body, dict) else None
        return self._said(str(detail)) + (f" ({self._said(code)})" if isinstance(code, str) else "")

    def _said(self, text: str) -> str:
        """Text of others in one line that can be shown, without the key."""
        return printable(" ".join(self._redacted(text).split()), LONGEST_MESSAGE)

    def _redacted(self, text: str) -> str:
        """Without the key, known from wherever, and without others of this user: servers may repeat them."""
        for form in known_forms(self.key):
            text = text.replace(form, MASK)
        return masked(text)

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
    if key:
        check_key(config.api_key_env, "--api-key-env")
    return key or None


async def _first(
    tasks: set[asyncio.Task[Completion]],
) -> tuple[set[asyncio.Task[Completion]], set[asyncio.Task[Completion]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _cancel(tasks: set[asyncio.Task[Completion]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
