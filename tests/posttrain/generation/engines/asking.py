"""Asks a server on this machine through the engine."""

from __future__ import annotations

from chat_server import serving

from gemma2.core.progress import SILENT
from gemma2.posttrain.generation.engines import Request, server
from gemma2.posttrain.schemas import GenerateConfig


def requests_of(count):
    return [
        Request((i, 0, 0), f"prompts.jsonl:{i + 1}", [{"role": "user", "content": f"prompt {i}"}], [], seed=100 + i)
        for i in range(count)
    ]


def ask(fake, count=4, known=(), **fields):
    """Completions by key, in the order in which they came."""
    with serving(fake) as address:
        config = GenerateConfig(teacher="a/model", prompts="p", engine="openai", base_url=address, **fields)
        engine = server.ServerEngine(config, SILENT)
        try:
            found = [completion for group in engine.complete(requests_of(count), known) for completion in group]
        finally:
            engine.close()
    return {completion.key: completion for completion in found}
