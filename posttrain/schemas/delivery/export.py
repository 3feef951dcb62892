"""`gemma2 export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from gemma2.posttrain.schemas.config import Config

__all__ = ["ExportConfig"]

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(kB|KB|MB|GB|TB)")
POWERS = {"kB": 1, "KB": 1, "MB": 2, "GB": 3, "TB": 4}
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class ExportConfig(Config):
    """A model as others take it: another dtype or shard size, an adapter merged, GGUF, a repository on the hub.

    Weights are copied tensor by tensor, without torch. An adapter is merged into its base, unless --keep-adapter is
    given; the way back, a model as an adapter of its base, is gemma2 merge extract-lora. --push uploads to a private
    repository, with the token of HF_TOKEN or of `hf auth login`; what doctor calls broken is refused.
    """

    model: Path = Field(description="model, adapter, reward model, MODEL+ADAPTER or hub id")
    llama_cpp: Path | None = Field(None, description="source directory of llama.cpp, for --gguf")
    results: Path | None = Field(None, description="output of gemma2 eval whose figures the card states (model-index)")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the written weights; default: that of the model"
    )
    shard_size: str | None = Field(None, description="weights in one file at most, such as 2GB; default: 5GB")
    keep_adapter: bool = Field(False, description="leave an adapter an adapter")
    gguf: Literal["f32", "f16", "bf16", "q8_0"] | None = Field(
        None, description="write one GGUF file of this type, with the converter in --llama-cpp"
    )
    endpoint: bool = Field(
        False, description="add handler.py and requirements.txt, which HF Inference Endpoints need for a reward model"
    )
    push: str | None = Field(None, description="repository on the hub to upload to: ORG/NAME")
    public: bool = Field(False, description="make the repository public")
    base_model: str | None = Field(None, description="hub id of the model that this one was made from, for its card")
    license: str | None = Field(None, description="licence that the card states")
    anyway: bool = Field(False, description="export what gemma2 doctor calls broken")

    @property
    def shard_bytes(self) -> int | None:
        """`shard_size` as a number."""
        found = SIZE.fullmatch(self.shard_size.strip()) if self.shard_size else None
        return round(float(found[1]) * 1000 ** POWERS[found[2]]) if found else None

    @field_validator("shard_size")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        found = SIZE.fullmatch(value.strip()) if value else None
        if value is not None and (found is None or float(found[1]) <= 0):
            raise ValueError("is not a size; give a number and a unit, such as 500MB or 2GB")
        return value

    @field_validator("push", "base_model")
    @classmethod
    def _is_a_repository(cls, value: str | None) -> str | None:
        if value is not None and not REPOSITORY.fullmatch(value):
            raise ValueError("is not the name of a repository; give ORG/NAME")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> ExportConfig:
        if (self.gguf is None) != (self.llama_cpp is None):
            given, missing = ("--gguf", "--llama-cpp DIR") if self.gguf else ("--llama-cpp", "--gguf TYPE")
            raise ValueError(f"{given} needs {missing} too; give both")
        shaped = [
            name
            for name, value in (
                ("--dtype", self.dtype),
                ("--shard-size", self.shard_size),
                ("--keep-adapter", self.keep_adapter),
                ("--endpoint", self.endpoint),
            )
            if value
        ]
        if self.gguf and shaped:
            raise ValueError(f"--gguf writes one file, of the type that it names; leave out {', '.join(shaped)}")
        if self.keep_adapter and (self.dtype or self.shard_size or self.endpoint):
            raise ValueError("--keep-adapter copies the adapter as it is; leave out --dtype, --shard-size, --endpoint")
        of_the_push = (
            ("--public", self.public),
            ("--license", self.license),
            ("--base-model", self.base_model),
            ("--results", self.results),
        )
        alone = next((name for name, value in of_the_push if value and self.push is None), None)
        if alone:
            raise ValueError(f"{alone} is about a repository; give --push ORG/NAME too")
        return self
