"""Uploads a model to the hub: file by file, then one commit, so that a repository never shows half a model.

What has arrived stays on the hub's storage: after a kill the same command sends only what is missing (by file, and with
hf_xet by piece). The token is that of HF_TOKEN or of `hf auth login`; it is in no message and in no file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.hub import hub_errors
from gemma2.core.progress import Progress
from gemma2.core.secret_text import masked
from gemma2.posttrain.doctor.checks.finding import Depth
from gemma2.posttrain.schemas.delivery.export import ExportConfig

from .gate import refuse_broken
from .hub_files import Pushed, pushed_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["push"]

# Weights of an earlier upload, where this one has no file of that name.
STALE = (".safetensors", ".safetensors.index.json", ".gguf")
MESSAGE = "Upload by gemma2 export"
SHOWN = 200  # characters of what the hub says
AGAIN = "start the same command again: what has arrived is kept"


def push(config: ExportConfig, directory: Path, progress: Progress) -> JsonObject:
    """Upload the model in `directory` to `config.push`. Raises InputError, if possible before a byte is sent."""
    name = str(config.push)
    if not any(directory.glob("*.gguf")):
        refuse_broken([directory], Depth.QUICK, config.anyway, progress)
    pushed = pushed_files(config, directory)
    for note in pushed.notes:
        progress.warn(note)
    began = time.monotonic()
    with quiet_hub(), reported(name):
        api = connected(name)
        there, private = prepare(api, name, config.public, progress)
        commit = send(api, name, pushed, there, progress)
    return {
        "repository": f"{api.endpoint}/{name}",
        "visibility": "private" if private else "public",
        "uploaded_files": len(pushed.sizes),
        "uploaded_bytes": pushed.bytes,
        "commit": commit,
        "seconds": round(time.monotonic() - began, 1),
    }


def connected(name: str) -> HfApi:
    """The hub's client with the user's token. Raises InputError without one, or offline."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"--push {name}: HF_HUB_OFFLINE forbids it", "unset HF_HUB_OFFLINE")
    if not get_token():
        raise InputError(f"--push {name} needs a token that may write", "set HF_TOKEN, or log in with `hf auth login`")
    return HfApi(endpoint=constants.ENDPOINT)


def prepare(api: HfApi, name: str, public: bool, progress: Progress) -> tuple[list[str], bool]:
    """Make the repository, or check the one that exists; return its files and whether it is private.

    Raises InputError for a public one that was not asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, private=not public)
        progress.note(f"made {name}, {'public' if public else 'private'}")
        return [], not public
    if not found.private and not public:
        raise InputError(
            f"{name} exists and is public: everybody would see the upload",
            "give --public if that is meant, or another name",
        )
    if found.private and public:
        progress.warn(f"{name} exists and is private; it stays so: its settings page changes that")
    return [one.rfilename for one in found.siblings or ()], bool(found.private)


def send(api: HfApi, name: str, pushed: Pushed, there: list[str], progress: Progress) -> str:
    """Send every file, then commit all of them at once and remove weights of an earlier upload; return the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    with progress.task(f"upload to {name}", total=pushed.bytes, unit="bytes") as task:
        for file, count in pushed.sizes.items():
            addition = CommitOperationAdd(file, pushed.texts.get(file) or str(pushed.paths[file]))
            api.preupload_lfs_files(name, [addition], free_memory=False)
            operations.append(addition)
            task.advance(count)
        stale = [file for file in there if file.endswith(STALE) and file not in pushed.sizes]
        operations += [CommitOperationDelete(file) for file in stale]
        for file in stale:
            progress.note(f"{name}: {file} of an earlier upload is removed")
        return str(api.create_commit(name, operations, commit_message=MESSAGE).oid)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the hub's own bars and warnings: progress is shown by this command."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    library = logging.getLogger("huggingface_hub")
    level, shown = library.level, not are_progress_bars_disabled()
    library.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        library.setLevel(level)
        if shown:
            enable_progress_bars()


@contextmanager
def reported(name: str) -> Iterator[None]:
    """Turn an error of the hub's library into one line, without the token."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, (*hub_errors(), RuntimeError)):  # RuntimeError: of a file, caused by the request's
            raise
        raise failure(name, error) from None  # the library's errors may quote headers


def failure(name: str, error: BaseException) -> InputError:
    """One line for an error of an upload."""
    causes = list(_chain(error))
    cause = next((one for one in causes if getattr(one, "response", None) is not None), causes[-1])
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError(
            f"the hub does not let this token write to {name} (status {status})",
            "give a token with write access to it (HF_TOKEN), and check the name",
        )
    said = masked(" ".join(str(getattr(cause, "server_message", None) or cause).split()))[:SHOWN]
    if status is None:
        return InputError(f"the upload to {name} broke off ({type(cause).__name__}: {said})", AGAIN)
    return InputError(f"the hub refused the upload to {name} (status {status}): {said}", AGAIN)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
