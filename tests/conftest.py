"""Makes a bare checkout importable as `gemma2`, and keeps every test off the network."""

import importlib.util
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if importlib.util.find_spec("gemma2") is None:
    namespace = types.ModuleType("gemma2")
    namespace.__path__ = [str(ROOT)]
    sys.modules["gemma2"] = namespace
