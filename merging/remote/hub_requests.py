"""Requests to the hub: the weight files of a commit, their sizes and etags, and ranges of their bytes.

URLs, tokens and the client are those of the hub's library. A file is asked for by its commit, and the etag of every
answer is compared with the first one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError
from gemma2.core.outputs.hub import WEIGHTS, repo_and_revision

from .partial_file import RemoteFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["NoRanges", "is_passing", "read_range", "remote_elements", "remote_files"]

PIECE = 1 << 20  # bytes that are written at once
HEAD = 1 << 18  # bytes of the first request for a header; most are shorter
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers that another try may not get
ETAG = re.compile(r"\w[\w.-]*", re.ASCII)  # becomes the name of a file
LINKED_ETAG = "x-linked-etag"


class NoRanges(Exception):
    """The server cannot send parts of files."""


def remote_files(name: str, role: str, folder: Path) -> list[RemoteFile]:
    """Return the weight files of a hub id that its snapshot does not hold. Raises errors of the hub's library."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    repo, commit = repo_and_revision(name)[0], folder.name
    found = []
    for file in HfApi().list_repo_files(repo, revision=commit):
        path = folder / file
        if not fnmatch(file, WEIGHTS) or path.exists():
            continue
        facts = get_hf_file_metadata(hf_hub_url(repo, file, revision=commit))
        if facts.etag is None or facts.size is None or not ETAG.fullmatch(facts.etag):
            raise NoRanges("the server does not state what identifies a file")
        found.append(RemoteFile(f"{role} {name}", repo, commit, file, path, facts.etag, facts.size))
    return found


def read_range(remote: RemoteFile, first: int, end: int) -> Iterator[bytes]:
    """Yield bytes [first, end) of a file, in pieces. Raises NoRanges, InputError, and errors of the hub's library."""
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(remote.repo, remote.name, revision=remote.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        _check_unchanged(remote, [answer.headers for answer in (*response.history, response)])
        if response.status_code != 206:
            raise NoRanges("the server sends whole files only")
        if response.headers.get("content-range") != f"bytes {first}-{end - 1}/{remote.size}":
            raise _changed(remote, f"it is sent as {response.headers.get('content-range')}, its size was {remote.size}")
        yield from response.iter_bytes(PIECE)


def remote_elements(remote: RemoteFile) -> int:
    """Return the number of elements of all tensors of a file, from its header alone. Raises like `read_range`."""
    start = b"".join(read_range(remote, 0, min(HEAD, remote.size)))
    length = 8 + int.from_bytes(start[:8], "little")
    if not 8 < length <= min(8 + LONGEST_HEADER, remote.size):
        raise InputError(f"{remote}: its header does not fit a file of {remote.size} bytes", "choose another revision")
    if length > len(start):
        start += b"".join(read_range(remote, len(start), length))
    try:
        entries = json.loads(start[8:length])
        return sum(math.prod(one["shape"]) for name, one in entries.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{remote}: its header is not that of safetensors", "choose another revision") from error


def _check_unchanged(remote: RemoteFile, answers: Sequence[Mapping[str, str]]) -> None:
    """Compare the etag of the first answer; storage that it redirects to has other etags."""
    stated = next((headers[LINKED_ETAG] for headers in answers if LINKED_ETAG in headers), None)
    etag = stated or (answers[0].get("etag") if len(answers) == 1 else None)
    if etag is not None and etag.removeprefix("W/").strip('"') != remote.etag:
        raise _changed(remote, f"its etag is {etag}, it was {remote.etag}")


def _changed(remote: RemoteFile, how: str) -> InputError:
    return InputError(f"{remote} changed on the server while it was fetched: {how}", "merge again")


def is_passing(error: Exception) -> bool:
    """Whether a failed request may be repeated: the connection broke, or the server is busy."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in PASSING
    network = tuple(kind for kind in HfHubHTTPError.__bases__ if kind is not OSError)
    return isinstance(error, (*network, ConnectionError, TimeoutError))
