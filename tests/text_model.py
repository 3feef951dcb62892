"""Weights whose one tensor is a text: valid safetensors that a test can read at a glance."""

from __future__ import annotations

from pathlib import Path

from gemma2.core.outputs.safetensors_header import encode_header, read_header


def write_text_model(directory: Path, text: str) -> None:
    """Write `model.safetensors` with the bytes of a text."""
    header, _ = encode_header({"text": ("U8", (len(text.encode()),))})
    (directory / "model.safetensors").write_bytes(header + text.encode())


def text_of(directory: Path) -> str:
    """Return the text of a model that `write_text_model` wrote."""
    path = directory / "model.safetensors"
    return path.read_bytes()[read_header(path)["text"].offset :].decode()
