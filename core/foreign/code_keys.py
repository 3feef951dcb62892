"""Keys of a model directory's JSON files that choose code: refused, unless they name what transformers itself has.

transformers takes `_attn_implementation: owner/repository` from config.json as a kernel to fetch and run, even if the
caller asked for another implementation, and `auto_map` as classes of the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemma2.core.errors import InputError
from gemma2.core.json_files import read_json
from gemma2.core.outputs.safetensors_header import printable

__all__ = ["STANDARD_ATTENTION", "refuse_code"]

FILES = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
OWN_CODE = ("auto_map", "custom_pipelines", "custom_generate")
KERNELS = ("use_kernels", "kernel_config", "use_hub_kernels")
IMPLEMENTATION = "_implementation"  # part of the keys that name one: _attn_implementation, experts_implementation, ...
STANDARD_ATTENTION = frozenset({"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"})
STANDARD = STANDARD_ATTENTION | {"flash_attention_4", "grouped_mm", "batched_mm", "dynamic", "static", "hybrid"}
STANDARD |= {"sliding_window", "offloaded", "offloaded_static", "dynamic_full", "quantized"}  # of cache_implementation


def refuse_code(directory: Path) -> None:
    """Raise InputError for a file of a model directory that asks for code, with file and key; also for broken JSON."""
    for name in FILES:
        path = directory / name
        if path.is_file():
            for key, value in _entries(read_json(path)):
                _check(path, key, value)


def _check(path: Path, key: str, value: object) -> None:
    if value is None or value is False or value == {}:
        return
    if key in OWN_CODE:
        raise InputError(f"{path} requires its own code ({key})", "use a model that transformers supports by itself")
    if key in KERNELS:
        raise InputError(f"{path} asks for kernels of others ({key})", f"remove {key} from it")
    if IMPLEMENTATION in key and not isinstance(value, bool | dict) and str(value) not in STANDARD:
        shown = printable(str(value))
        raise InputError(f"{path} chooses the implementation {shown} ({key})", f"remove {key} from it")


def _entries(value: object) -> Iterator[tuple[str, object]]:
    """Keys and values at every depth; the values of a mapping under an implementation's key have its name."""
    waiting = [("", value)]
    while waiting:
        above, node = waiting.pop()
        if isinstance(node, dict):
            for key, item in node.items():
                name = above if IMPLEMENTATION in above else str(key)
                yield name, item
                waiting.append((name, item))
        elif isinstance(node, list):
            waiting += [(above, item) for item in node]
