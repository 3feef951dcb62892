"""The files that a Hugging Face Inference Endpoint needs for a reward model, as they come with this package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ENDPOINT_FILES"]

HERE = Path(__file__).parent
# handler.py is this room's module, and stands alone: it imports nothing of this package.
ENDPOINT_FILES = (HERE / "handler.py", HERE / "requirements.txt")
