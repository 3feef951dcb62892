"""Secrets in texts: found in settings, which outputs would record, and masked in what servers say and in what is shown.

    known      the values of environment variables that hold keys: those of model servers, those that were allowed, and
               names that end as keys do (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY)
    by place   user and password of an address; the value of `?key=`, `?token=` and their like
    by form    what begins as keys of services do: `sk-`, `hf_`, `ghp_` and further letters and digits

A known value is masked in the forms that a server may send back: as it is, URL-encoded, and as JSON escapes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from urllib.parse import quote

from gemma2.core.permissions import ALLOWED_KEYS, KEY_NAMES

__all__ = ["LIKE_A_KEY", "MASK", "known_forms", "masked", "secret_in"]

MASK = "***"
SHORTEST = 12  # characters of a value that is taken for a key
NAMES = re.compile(r"(^|_)(API_KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD)$")
LIKE_A_KEY = re.compile(r"(sk|pk|rk|gsk|hf|xai|key|api|ghp|nvapi|AKIA|AIza)[-_A-Za-z0-9]*\d[-_A-Za-z0-9]{12,}$")
SHOWN_KEY = re.compile(r"(?<![A-Za-z0-9])((?:sk-|gsk_|hf_|ghp_|xai-|nvapi-)[-_A-Za-z0-9]{16,})")
USER = re.compile(r"(:/{1,2})[^/\s@?#'\"]+@")  # a path that was an address has one slash
QUERY = re.compile(r"([?&](?:[\w-]*[-_])?(?:key|token|secret|password|signature|sig)=)[^&\s#'\"]+", re.IGNORECASE)
# Keys of a free mapping (`request.api_key`) whose values are secrets. `max_tokens` and `prompt_cache_key` are not.
FIELD = re.compile(
    r"(^|[-_])((api|access|auth|secret|hf|hub|bearer)[-_]?(key|token)|secret|password|passwd|credentials?|authorization)$"
    r"|^token$",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Return a text with `***` in the place of every secret."""
    for form in known_forms():
        text = text.replace(form, MASK)
    if ":/" in text:
        text = QUERY.sub(rf"\1{MASK}", USER.sub(rf"\1{MASK}@", text))
    return SHOWN_KEY.sub(MASK, text) if "-" in text or "_" in text else text


def known_forms(more: str | None = None) -> list[str]:
    """Return the texts by which a server may repeat a key of the environment, or `more`; the longest first."""
    found: set[str] = set()
    for secret in {*_known().values(), *([more] if more else [])}:
        escaped = json.dumps(secret)[1:-1]
        found |= {secret, quote(secret, safe=""), quote(secret), escaped, escaped.replace("/", "\\/")}
    return sorted(found, key=lambda form: -len(form))


def secret_in(values: object, place: str = "") -> tuple[str, str] | None:
    """Return where settings hold a secret, as a dotted path, and why it is one; None if they hold none."""
    known = _known()
    for path, key, value in _texts(values, place):
        if FIELD.search(key) and "." in path and value:
            return path, f"a key called {key} is a secret"
        for name, secret in known.items():
            if secret in value:
                return path, f"it holds the value of the environment variable {name}"
    return None


def _texts(values: object, place: str) -> Iterator[tuple[str, str, str]]:
    """(dotted path, last key, text) of every text in a mapping, at any depth."""
    waiting: list[tuple[str, str, object]] = [(place, "", values)]
    while waiting:
        path, last, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path}.{key}".lstrip("."), str(key), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(path, last, item) for item in value]
        elif isinstance(value, str):
            yield path, last, value


def _known() -> dict[str, str]:
    """The variables that hold a key, and their values."""
    named = {*KEY_NAMES, *(name.strip() for name in os.environ.get(ALLOWED_KEYS, "").split(","))}
    return {
        name: value.strip()
        for name, value in os.environ.items()
        if (name in named or NAMES.search(name)) and _is_secret(value.strip())
    }


def _is_secret(value: str) -> bool:
    """Whether it may be a key: not a path, a sentence or a word."""
    return len(value) >= SHORTEST and not value.startswith(("/", "~", ".")) and not any(map(str.isspace, value))
