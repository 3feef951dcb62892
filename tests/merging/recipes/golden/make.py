"""Record what mergekit makes of cases.py. Runs only where mergekit 0.1.5 is installed; README.md has the command."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from cases import CASES, CONFIG, PRECISE, SEEDS, arrays, digest
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
FLAGS = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")


def write(folder: Path, name: str, dtype: str) -> None:
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps({**CONFIG, "dtype": dtype}))
    tensors = {key: torch.from_numpy(array).to(getattr(torch, dtype)) for key, array in arrays(name).items()}
    save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})


def merged(folder: Path, text: str) -> np.ndarray:
    """All tensors of the result in the order of their names: fp32, or bf16 as its bits."""
    (folder / "case.yaml").write_text(text)
    shutil.rmtree(folder / "out", ignore_errors=True)
    tool = Path(sys.executable).with_name("mergekit-yaml")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([tool, "case.yaml", "out", *FLAGS], cwd=folder, check=True, env=offline)
    tensors = {}
    for file in sorted((folder / "out").glob("*.safetensors")):
        tensors |= load_file(file)
    flat = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


chosen = sys.argv[1:]  # names of cases; none is all
for dtype, ending in (("float32", ""), ("bfloat16", PRECISE)):
    file = HERE / f"{dtype}.npz"
    with tempfile.TemporaryDirectory() as place:
        for model in SEEDS:
            write(Path(place), model, dtype)
        found = dict(np.load(file)) if chosen else {}
        found |= {name: merged(Path(place), CASES[name] + ending) for name in chosen or CASES}
        np.savez_compressed(file, **{**found, "inputs": np.array(digest())})
