"""kill -9 at every boundary between stages and inside stages, then on: the bytes are those of a run left alone.

The pipeline is `gemma2 warp` (with --resume) and `gemma2 pipeline run` of a small chain with WARP in it.
"""

import json
import os
import random
from pathlib import Path

import pytest
from processes import MAIN, finish, start
from waiting import pause, wait_for

from gemma2.posttrain.runs.commands import output_hash
from gemma2.posttrain.tiny.networks import save_random
from gemma2.posttrain.tiny.tasks import questions

pytestmark = pytest.mark.slow

RL = {
    "steps": 4,
    "prompts_per_step": 2,
    "n": 2,
    "mu": 0.25,
    "temperature": 1.0,
    "max_new_tokens": 12,
    "save_every": 1,
    "eval_every": 2,
    "eval_prompts": 6,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "cpus": 1,
}
PIPELINE = """
stages:
  sft:
    command: sft
    options: {{model: sft, data: rows.jsonl, max_steps: 6, batch_size: 4, save_every: 1, max_length: 64}}
  w:
    command: warp
    options: {{sft: "${{sft.out}}", reward: [reward], prompts: train.jsonl, heldout: heldout.jsonl, {rl}}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    save_random(root / "sft", seed=0)
    settings = json.loads((root / "sft" / "generation_config.json").read_text())
    # A fifth of the vocabulary ends a turn: an untrained model then answers in a few tokens.
    stops = {"eos_token_id": [*settings["eos_token_id"], *range(300, 400)]}
    (root / "sft" / "generation_config.json").write_text(json.dumps(settings | stops))
    save_random(root / "reward", seed=1, kind="reward")
    for split, count in (("train", 24), ("heldout", 12)):
        rows = questions(split, count, seed=0)
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"prompt": "What is two plus two?", "completion": "Four."}
    rows = [json.dumps({**row, "prompt": f"{row['prompt']} ({i})"}) for i in range(16)]
    (root / "rows.jsonl").write_text("\n".join(rows))
    (root / "p.yaml").write_text(PIPELINE.format(rl=", ".join(f"{key}: {value}" for key, value in RL.items())))
    return root


def pipeline(out: str, resume: bool) -> list[str]:
    return ["pipeline", "run", "p.yaml", "--out", out, "--quiet"]


def warp(out: str, resume: bool) -> list[str]:
    flags = [word for key, value in RL.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    inputs = ["--sft", "sft", "--reward", "reward", "--prompts", "train.jsonl", "--heldout", "heldout.jsonl"]
    return ["warp", *inputs, *flags, "--out", out, "--quiet", *(["--resume"] if resume else [])]


STAGES = 12  # of a WARP run with two policies and two iterations
COMMANDS = {"pipeline": pipeline, "warp": warp}


def begin(place: Path, words: list[str]):
    return start(MAIN, *words, cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"})


def digests(root: Path) -> dict[str, str]:
    """Hash and files of every stage; pictures and texts among them."""
    found = {}
    for path in sorted(root.rglob("gemma2.json")):
        manifest = json.loads(path.read_text())
        name = path.parent.relative_to(root).as_posix()
        if name != ".":
            found[name] = output_hash(manifest)
            found |= {f"{name}/{file}": entry["digest"] for file, entry in manifest["files"].items()}
    return {name: digest for name, digest in found.items() if not name.endswith(("README.md", ".html"))}


@pytest.fixture(scope="module", params=COMMANDS)
def whole(request, place):
    out = f"{request.param}-whole"
    code, _, err = finish(begin(place, COMMANDS[request.param](out, False)))
    assert code == 0, err
    return request.param, digests(place / out)


def states(folders: list[Path]) -> dict[str, str]:
    for folder in folders:
        try:
            document = json.loads((folder / "pipeline.json").read_text())
            return {name: stage["status"] for name, stage in document["stages"].items()}
        except (FileNotFoundError, NotADirectoryError):
            continue
    return {}


def kill_when(place: Path, command: str, out: str, reached, delay: float) -> bool:
    """Start or go on, and kill as soon as the state says so. False when it ended by itself."""
    folders = [place / out, place / f".{out}.partial"]
    process = begin(place, COMMANDS[command](out, any(folder.exists() for folder in folders)))
    wait_for(lambda: reached(states(folders)) or process.poll() is not None)
    pause(delay)
    ended = process.poll()
    process.kill()
    _, err = process.communicate()
    assert ended in (None, 0), err
    return ended is None


def end(place: Path, command: str, out: str) -> dict[str, str]:
    if not (place / out / "gemma2.json").exists():
        code, _, err = finish(begin(place, COMMANDS[command](out, (place / f".{out}.partial").exists())))
        assert code == 0, err
    return digests(place / out)


def test_killed_at_every_boundary_between_stages(place, whole):
    command, expected = whole
    out = f"{command}-boundaries"
    kills = 0
    for count in range(1, STAGES):
        if kill_when(place, command, out, lambda found, n=count: list(found.values()).count("complete") >= n, 0.0):
            kills += 1
    assert kills >= STAGES - 3  # two stages that end at once are one boundary
    assert end(place, command, out) == expected


def test_killed_inside_of_stages(place, whole):
    command, expected = whole
    out = f"{command}-inside"
    kills = 0
    for _ in range(12):
        delay = random.uniform(0.0, 1.5)  # a new one every time
        if not kill_when(place, command, out, lambda found: "running" in found.values(), delay):
            break
        kills += 1
    assert kills >= 3
    assert end(place, command, out) == expected
