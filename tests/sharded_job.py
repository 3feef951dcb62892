"""Trainings on several processes: `python sharded_job.py ROOT`, started by torchrun, runs what ROOT/jobs.json lists.

A job is {name, command, config, resume, stop, poison}: its output is ROOT/name. stop: the steps after which all end as
if they had been killed; poison: those after which a weight of one becomes NaN. {name, tear} cuts a file in the middle,
{name, probe} runs a function of shard_probes.py. How each job ended is in ROOT/outcomes-RANK.json.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from processes import BARE_CHECKOUT

ENDLESS = " and that is all there is to say"


def write_material(root: Path) -> Path:
    """Fill `root`: a tiny policy that ends its turns, another one as teacher, rows, pairs of texts."""
    from rl_job import write_job

    from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer

    write_job(root)
    teacher = random_model(1)
    with torch.no_grad():
        teacher.model.embed_tokens.weight[107] *= 8
    teacher.save_pretrained(root / "teacher")
    tiny_tokenizer().save_pretrained(root / "teacher")
    drawn = random.Random(0)
    rows = [
        {"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}" + ENDLESS * drawn.randrange(3)}
        for a in range(5)
        for b in range(5)
    ]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No" * (i % 4 + 1)}
        for i, row in enumerate(rows)
    ]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return root


def settings(root: Path, command: str, **more: object) -> dict[str, object]:
    """The settings of a short training; its last batch of an epoch is not full."""
    shared: dict[str, object] = {
        "model": str(root / "policy"),
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "log_every": 1,
    }
    shared |= {"save_every": 2, "eval_every": 2, "batch_size": 8, "seed": 3, "lora_rank": 0}
    if command == "sft":
        shared |= {"data": [str(root / "rows.jsonl")], "epochs": 2, "eval_fraction": 0.2}
    elif command == "reward":
        shared |= {"data": str(root / "pairs.jsonl"), "epochs": 2, "eval_fraction": 0.2}
    else:
        shared |= {"teacher": str(root / "teacher"), "prompts": str(root / "rows.jsonl"), "steps": 6, "n": 2}
        shared |= {"max_new_tokens": 8, "temperature": 1.0}
    return shared | more


def run_jobs(root: Path, jobs: list[dict]) -> dict[str, list]:
    """Run jobs in this process, one after another. Returns how those of each name ended."""
    found: dict[str, list] = {}
    for job in jobs:
        found.setdefault(job["name"], []).append(run_job(root, job))
    return found


def run_job(root: Path, job: dict) -> object:
    """Run one job in this process. Returns "done", "stopped", or its error; of a probe its facts."""
    if "tear" in job:
        if os.environ.get("RANK", "0") == "0":
            torn = root / job["tear"]
            torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
        return "torn"
    if "probe" in job:
        from shard_probes import PROBES

        return PROBES[job["probe"]](root)
    from gemma2.core.errors import Gemma2Error
    from gemma2.core.ranks import RankEnd
    from gemma2.posttrain.distillation.distill import run_distill
    from gemma2.posttrain.preferences.train import run_reward
    from gemma2.posttrain.runs.run_directory import RunOptions
    from gemma2.posttrain.schemas import DistillConfig, RewardConfig, SftConfig
    from gemma2.posttrain.sft.sft import run_sft

    schema, run = {
        "sft": (SftConfig, run_sft),
        "reward": (RewardConfig, run_reward),
        "distill": (DistillConfig, run_distill),
    }[job["command"]]
    options = RunOptions(root / job["name"], resume=job.get("resume", False))
    try:
        with stopping(job.get("stop"), job.get("poison")):
            run(schema(**job["config"]), options)
    except Stopped:
        return "stopped"
    except Gemma2Error as error:
        return str(error)
    except RankEnd as end:
        return f"ends with rank 0: {end.code}"
    return "done"


class Stopped(Exception):
    """Ends every process before a step."""


class stopping:
    """Raise Stopped after `stop` steps, while open; after `poison` steps a weight of the last process becomes NaN."""

    def __init__(self, stop: int | None, poison: int | None = None) -> None:
        self.stop, self.poison = stop, poison

    def __enter__(self) -> None:
        from gemma2.posttrain.sharding.units import local
        from gemma2.posttrain.training.trainer import RunCallback

        self.before = RunCallback.on_step_begin
        stop, poison, before = self.stop, self.poison, self.before

        def begin(callback, args, state, control, **kwargs):
            if state.global_step == stop:
                raise Stopped
            if state.global_step == poison and args.process_index == args.world_size - 1:
                trained = next(value for value in kwargs["model"].parameters() if value.requires_grad)
                local(trained.data).view(-1)[0] = float("nan")
            before(callback, args, state, control, **kwargs)

        RunCallback.on_step_begin = begin

    def __exit__(self, *_: object) -> None:
        from gemma2.posttrain.training.trainer import RunCallback

        RunCallback.on_step_begin = self.before


def environment() -> dict[str, str]:
    """One thread for each process."""
    tests = Path(__file__).parent
    here = os.pathsep.join(map(str, (tests, tests / "posttrain/sharding")))
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": here, **quiet}


def start_jobs(root: Path, jobs: list[dict], processes: int, *launcher: str) -> subprocess.Popen:
    """Start torchrun with this file on `processes` processes; its stderr is a pipe."""
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    script = root / "sharded_script.py"
    script.write_text(BARE_CHECKOUT + "from sharded_job import main\nmain()\n", encoding="utf-8")
    how = launcher or ("--standalone",)
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *how,
        f"--nproc-per-node={processes}",
        str(script),
        str(root),
    ]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())


def outcomes(root: Path, rank: int = 0) -> dict[str, list]:
    """How the jobs of a rank ended, by name."""
    return json.loads((root / f"outcomes-{rank}.json").read_text(encoding="utf-8"))


def main() -> None:
    """Run the jobs of a root as one of several processes."""
    from gemma2.core.ranks import join

    torch.set_num_threads(1)
    join("the tests")
    root = Path(sys.argv[1])
    found = run_jobs(root, json.loads((root / "jobs.json").read_text(encoding="utf-8")))
    (root / f"outcomes-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
