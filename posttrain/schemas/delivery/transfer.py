"""`push` and `pull` as stages of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from gemma2.posttrain.schemas.config import Config

__all__ = ["PullConfig", "PushConfig"]


class PushConfig(Config):
    """Copy outputs to another disk or an object store: each to URI/NAME, by the name of its directory."""

    SPELT_BY_COMMAND: ClassVar[frozenset[str]] = frozenset({"uri", "outputs"})

    uri: str = Field(min_length=1, description="folder of any fsspec file system: s3://bucket/runs, gs://..., a path")
    outputs: tuple[Path, ...] = Field(min_length=1, description="directories to copy, each a complete output")


class PullConfig(Config):
    """Copy an output from another disk or an object store."""

    SPELT_BY_COMMAND: ClassVar[frozenset[str]] = frozenset({"uri"})

    uri: str = Field(min_length=1, description="an output in any fsspec file system: s3://bucket/runs/sft, a path")
    kind: Literal["policy", "reward model", "adapter", "data", "front"] = Field(
        "policy", description="what it is, for the check of the pipeline before it is here"
    )
