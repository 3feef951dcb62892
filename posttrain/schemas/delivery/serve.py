"""`gemma2 serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from gemma2.posttrain.schemas.config import Config

__all__ = ["ServeConfig"]


class ServeConfig(Config):
    """Serve a model with vLLM, as Gemma 2 needs it: bf16, its context, its template, its stop tokens.

    The model and this machine are checked first, as gemma2 doctor --quick does, and vLLM's attention is compared with
    eager attention, once for each version of vLLM and GPU. Then this process becomes vLLM. Words after -- go to it.
    """

    model: Path = Field(description="model, adapter or hub id")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every network")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    max_model_len: int | None = Field(None, ge=1, description="context, tokens; default: the model's, 8192 for Gemma 2")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="precision; fp16 is not offered")
    devices: int = Field(1, ge=1, description="GPUs that the model is divided over")
    anyway: bool = Field(False, description="serve what gemma2 doctor calls broken")
