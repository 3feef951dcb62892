"""What the user allowed for this process and those that it starts: hosts, keys, other versions.

A recipe, a pipeline or the manifest of an output can name a server and the variable of its key, and may come from
somebody else. So a host that a file names must be allowed outside the file: with `--allow-host`, by the command line
that names it, or in GEMMA2_ALLOW_HOSTS. Variables are those of `KEY_NAMES`, or allowed in the same three ways. With
`--allow-versions` an interrupted run may go on with other versions of what computes.
The permissions are kept in the environment, so that the processes of a pipeline's stages have them too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from gemma2.core.errors import UsageError

__all__ = [
    "ALLOWED_HOSTS",
    "ALLOWED_KEYS",
    "KEY_NAMES",
    "allow",
    "allow_again",
    "check_host",
    "check_key",
    "is_local",
    "permissions",
    "versions_allowed",
]

ALLOWED_HOSTS, ALLOWED_KEYS = "GEMMA2_ALLOW_HOSTS", "GEMMA2_ALLOW_KEYS"
ALLOWED_VERSIONS = "GEMMA2_ALLOW_VERSIONS"  # 1: an interrupted run goes on with other versions
PERMISSIONS = (ALLOWED_HOSTS, ALLOWED_KEYS, ALLOWED_VERSIONS)
DEFAULT_SERVER = ("https", "api.openai.com", 443)
PORTS = {"http": 80, "https": 443}
# Variables that hold the key of a model server, and nothing else. A name like GITHUB_TOKEN is not among them.
KEY_NAMES = (
    *("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "MISTRAL_API_KEY", "DEEPSEEK_API_KEY"),
    *("OPENROUTER_API_KEY", "TOGETHER_API_KEY", "FIREWORKS_API_KEY", "GROQ_API_KEY", "VLLM_API_KEY"),
)


def permissions() -> dict[str, str]:
    """Return what is allowed, for `allow_again` in another process."""
    return {name: os.environ.get(name, "") for name in PERMISSIONS}


def allow_again(given: Mapping[str, str]) -> None:
    """Allow what `permissions` returned in the process that started this one."""
    for name in PERMISSIONS:
        os.environ[name] = given.get(name, "")


def allow(hosts: Iterable[str] = (), keys: Iterable[str] = (), versions: bool = False) -> None:
    """Allow hosts (`HOST`, `HOST:PORT` or an address) and variables for this process and those that it starts.

    versions  an interrupted run may go on with other versions of what computes
    """
    if versions:
        os.environ[ALLOWED_VERSIONS] = "1"
    for name, more in ((ALLOWED_HOSTS, hosts), (ALLOWED_KEYS, keys)):
        added = [item.strip() for item in more if item.strip()]
        if added:
            os.environ[name] = ",".join(dict.fromkeys([*_listed(name), *added]))


def versions_allowed() -> bool:
    """Whether an interrupted run may go on with other versions of what computes."""
    return os.environ.get(ALLOWED_VERSIONS) == "1"


def check_host(address: str, option: str) -> None:
    """Raise UsageError for an address whose host is neither the default, nor this machine, nor allowed.

    The address must have passed `check_address`.
    """
    scheme, host, port = _server(address)
    if (scheme, host, port) == DEFAULT_SERVER or is_local(host):
        return
    for allowed in _listed(ALLOWED_HOSTS):
        if _name_and_port(allowed) in ((host, None), (host, port)):
            return
    shown = host if port == PORTS.get(scheme) else f"{f'[{host}]' if ':' in host else host}:{port}"
    raise UsageError(
        f"{option} sends data to {shown}, which is not allowed outside the file that names it",
        f"if you trust it, add --allow-host {shown}, or set {ALLOWED_HOSTS}={shown}",
    )


def check_key(name: str, option: str) -> None:
    """Raise UsageError for a variable that is neither known to hold a server's key nor allowed."""
    if name in KEY_NAMES or name in _listed(ALLOWED_KEYS):
        return
    if name != name.upper():  # it may be the key itself, which no error repeats
        raise UsageError(f"{option} is not allowed in a file", f"give it on the command line, or set {ALLOWED_KEYS}")
    raise UsageError(
        f"{option} sends the environment variable {name} to a server, which is not allowed outside the file that "
        "names it",
        f"if that is meant, add --allow-key {name}, or set {ALLOWED_KEYS}={name}",
    )


def is_local(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _listed(name: str) -> list[str]:
    return [item.strip() for item in os.environ.get(name, "").split(",") if item.strip()]


def _server(address: str) -> tuple[str, str, int | None]:
    parts = urlsplit(address)
    return parts.scheme, (parts.hostname or "").rstrip(".").lower(), parts.port or PORTS.get(parts.scheme)


def _name_and_port(text: str) -> tuple[str, int | None]:
    """Host and port of `HOST`, `HOST:PORT`, `[IPV6]:PORT`, a bare IPv6 address or a URL; else no host."""
    try:
        if "://" in text:
            _, host, port = _server(text)
            return host, port
        if text.count(":") > 1 and not text.startswith("["):
            return str(ip_address(text)), None
        parts = urlsplit(f"//{text}")
        return (parts.hostname or "").rstrip(".").lower(), parts.port
    except ValueError:
        return "", None
