"""Locates a model: a directory, or a hub id (`owner/name`, `owner/name@revision`) from the hub or its cache.

Only safetensors weights, JSON, tokenizer files and chat templates are fetched: no pickle ever reaches the disk.
huggingface_hub is imported for the first hub id, so that directories need no network library.
"""

from __future__ import annotations

import re
from pathlib import Path

from gemma2.core.errors import InputError

__all__ = [
    "SNAPSHOT",
    "WEIGHTS",
    "fetch_snapshot",
    "hub_errors",
    "hub_failure",
    "is_hub_id",
    "locate_model",
    "repo_and_revision",
]

# Path of a model in the hub's cache: the folder of one revision.
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]+)/?$")
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
WEIGHTS = "*.safetensors"
FETCHED = (WEIGHTS, "*.json", "*.jinja", "tokenizer*.txt", "*.model", "merges.txt", "vocab.txt")


def is_hub_id(name: str | Path) -> bool:
    """Whether a name can be a hub id: `owner/name`, and neither that path nor a folder `owner` exists here."""
    path = Path(name)
    return HUB_ID.fullmatch(str(name)) is not None and not path.exists() and not Path(path.parts[0]).exists()


def locate_model(name: str | Path, role: str) -> Path:
    """Return the directory of a model. A hub id is looked up on the hub, or offline (HF_HUB_OFFLINE=1) in its cache.

    Raises InputError naming the id and the cause. A path that does not exist and is not a hub id is returned unchanged:
    the code that opens it reports the error.
    """
    return fetch_snapshot(str(name), role) if is_hub_id(name) else Path(name)


def repo_and_revision(name: str) -> tuple[str, str | None]:
    """Return the two parts of a hub id."""
    found = HUB_ID.fullmatch(name)
    return (found["name"], found["revision"]) if found else (name, None)


def fetch_snapshot(name: str, role: str, *, weights: bool = True) -> Path:
    """Return the snapshot of a hub id in the cache; fetch it if necessary, on demand without its weights.

    Raises InputError naming the id and the cause.
    """
    from huggingface_hub import snapshot_download

    repo, revision = repo_and_revision(name)
    left_out = None if weights else [WEIGHTS]
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=list(FETCHED), ignore_patterns=left_out)
    except hub_errors() as error:
        raise hub_failure(name, role, error) from error
    return Path(folder)


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors that the hub's library raises for requests that fail."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases of the hub's own error include the error class of the network library that the installed version uses.
    return (*HfHubHTTPError.__bases__, OSError, ValueError)


def hub_failure(name: str, role: str, error: Exception) -> InputError:
    """Return one line for an error of the hub's library."""
    from huggingface_hub import constants, errors

    here = f"{role} {name} is not a directory here"
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{role} {name} is gated on the hub", "accept its terms on its page, then log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{role} {name}: the hub has the model but not this revision", "name a branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return InputError(
            f"{here}, and the hub has no public model of that name", "check the name; log in if the model is private"
        )
    incomplete = getattr(errors, "IncompleteSnapshotError", ())
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        state = "only partly in the hub's cache" if isinstance(error, incomplete) else "not in the hub's cache"
        return InputError(
            f"{here}, it is {state}, and HF_HUB_OFFLINE forbids fetching it", "give a directory, or go online once"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return InputError(f"{here}, and the hub cannot be reached", "check the network, or give a directory")
    return InputError(
        f"{role} {name} could not be fetched from the hub ({type(error).__name__})",
        "check the network and the space in the cache, or give a directory",
    )
