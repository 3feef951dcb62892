"""The HTTP client of the server engine: redirects stay on the server, answers are not compressed and have a size.

Compressed answers are neither requested nor read: a body of one MB may stand for gigabytes. openai reads the body of an
error whole, so the size is limited below it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

from gemma2.core.errors import InputError
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.permissions import PORTS

from .reply import Unreadable

__all__ = ["HEADERS", "guarded_client", "http_library"]

HEADERS = {"Accept-Encoding": "identity"}
SHOWN = 100  # characters of what a server says


def http_library() -> Any:  # noqa: ANN401
    """The HTTP library that openai is built on, which differs by its version."""
    import openai

    names = [base.__module__.partition(".")[0] for base in openai.DefaultAsyncHttpxClient.__mro__]
    return import_module(next(name for name in names if name != "openai"))


def guarded_client(address: str, most_bytes: int) -> Any:  # noqa: ANN401
    """A client that raises InputError for a redirect to another server, Unreadable for an answer that is not read.

    openai hands on what is raised before a body is read as the cause of its APIConnectionError.
    """
    import openai

    library = http_library()
    origin = library.URL(address)

    async def stay(request: Any) -> None:  # noqa: ANN401
        """Refuse a request to another server. A redirect from http to https on the same host stays."""
        url = request.url
        same = (url.scheme, url.host, _port(url)) == (origin.scheme, origin.host, _port(origin))
        safer = (origin.scheme, url.scheme) == ("http", "https") and url.host == origin.host and url.port is None
        if not same and not (safer and origin.port is None):
            place = printable(f"{url.scheme}://{url.netloc.decode(errors='replace').rpartition('@')[2]}", SHOWN)
            raise InputError(
                f"{address} redirects to {place}, which would read the prompts", "give that address if you trust it"
            )

    async def limit(response: Any) -> None:  # noqa: ANN401
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise Unreadable(f"it has the encoding {printable(encoding, SHOWN)}, which was not requested")
        response.stream = _limited(library, response.stream, most_bytes)

    return openai.DefaultAsyncHttpxClient(event_hooks={"request": [stay], "response": [limit]})


def _port(url: Any) -> int | None:  # noqa: ANN401
    return url.port or PORTS.get(url.scheme)


def _limited(library: Any, stream: Any, most_bytes: int) -> Any:  # noqa: ANN401
    """The stream of a body that raises Unreadable after `most_bytes`, a margin included."""

    class Limited(library.AsyncByteStream):  # type: ignore[misc]
        """Counts what it hands on."""

        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = 2 * most_bytes
            async for part in stream:
                left -= len(part)
                if left < 0:
                    raise Unreadable(f"it has more than {most_bytes >> 20} MiB")
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    return Limited()
