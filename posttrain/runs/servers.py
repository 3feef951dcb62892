"""The servers that a configuration names, and whether the user allowed them (`core/permissions.py`). Torch-free."""

from __future__ import annotations

import os
from collections.abc import Sequence

from gemma2.core.json_files import JsonMapping
from gemma2.core.permissions import allow, check_host, check_key
from gemma2.core.yaml_files import given_by
from gemma2.posttrain.schemas.config import Config

__all__ = ["ADDRESSES", "KEY_VARIABLES", "allow_given", "check_servers", "names_servers"]

# Fields that name a server, and those that name the variable of its key.
ADDRESSES = ("base_url", "judge_url", "vllm_server_url")
KEY_VARIABLES = ("api_key_env", "judge_key_env")


def names_servers(schema: type[Config]) -> bool:
    """Whether a command can send data to a server of the user's choice."""
    return any(name in schema.model_fields for name in ADDRESSES)


def allow_given(config: Config, flags: JsonMapping, sets: Sequence[str]) -> None:
    """Allow the servers and variables that flags and `--set` name: the user typed them."""

    def typed(names: Sequence[str]) -> list[str]:
        given = [name for name in names if flags.get(name) is not None or given_by(sets, [name])]
        return [value for name in given if isinstance(value := getattr(config, name, None), str)]

    allow(typed(ADDRESSES), typed(KEY_VARIABLES))


def check_servers(config: Config) -> None:
    """Raise UsageError for a server, or a variable that holds a key, that is used and not allowed."""
    if getattr(config, "engine", None) == "openai" or getattr(config, "judge_model", None):
        for name in KEY_VARIABLES:
            variable = getattr(config, name, None)
            if variable is not None and os.environ.get(variable):
                check_key(variable, _flag(name))
    elif getattr(config, "vllm_mode", None) != "server":
        return
    for name in ADDRESSES:
        address = getattr(config, name, None)
        if address is not None:
            check_host(address, _flag(name))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
