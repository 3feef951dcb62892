"""`--max-length` against the context of the models: positions behind it were never learned, or do not exist."""

from __future__ import annotations

from gemma2.core.errors import InputError
from gemma2.posttrain.data.examples import context_of
from gemma2.posttrain.runs.inputs import paths_of
from gemma2.posttrain.schemas.config import Config

__all__ = ["check_context"]

READERS = ("model", "models", "teacher")  # fields whose models read whole rows


def check_context(config: Config) -> None:
    """Raise InputError for a `--max-length` above the context of a model on disk that reads the rows."""
    limit = getattr(config, "max_length", None)
    if limit is None:
        return
    contexts = [(context, path) for name in READERS for path in paths_of(config, name) if (context := context_of(path))]
    context, path = min(contexts, default=(limit, None))
    if context < limit:
        raise InputError(
            f"--max-length {limit} is more than the context of {path}: {context} (max_position_embeddings)",
            f"lower it: --max-length {context}",
        )
