"""Folders as runs and pipelines leave them, while they work and afterwards."""

import json
from contextlib import ExitStack

from gemma2.core.json_files import write_json
from gemma2.core.outputs.staging import locked, partial_path
from gemma2.posttrain.runs.live import LiveRecord

BEGAN = "2026-11-29T10:00:00Z"
CONFIG = {"max_kl": 20.0, "max_dead_steps": 10, "eval_every": 2}


def line(step, **figures):
    """A line of a step of `rlhf`."""
    given = {"loss": 1.0, "learning_rate": 1e-6, "gradient_norm": 0.5, "reward": step / 10, "kl_anchor": 0.1}
    given |= {"reward_std_in_group": 0.3, "length": 12.0, "truncated": 0.0}
    return {"step": step, **(given | figures)}


def evaluation(step, **figures):
    """A line of an evaluation."""
    return {
        "step": step,
        "kind": "eval",
        **({"reward": 0.5, "kl": step / 2, "length": 11.0, "truncated": 0.0} | figures),
    }


class Folder:
    """A run or a pipeline below `root`; `held` says that a process works at it."""

    def __init__(self, root):
        self.root = root
        self.stack = ExitStack()

    def held(self, out=None):
        self.stack.enter_context(locked(out or self.root))

    def released(self):
        self.stack.close()

    def run(self, out=None, command="rlhf", **config):
        """The partial directory of a run that has begun."""
        partial = partial_path(out or self.root)
        partial.mkdir(parents=True)
        write_json(partial / "run.json", {"command": command, "config": CONFIG | config, "started": BEGAN})
        return partial

    def pipeline(self, status="running", **stages):
        """pipeline.json; stages: name -> status, or the whole record."""
        records = {
            name: {"command": "rlhf", "needs": [], "started": BEGAN, "seconds": 5.0}
            | (one if isinstance(one, dict) else {"status": one})
            for name, one in stages.items()
        }
        self.root.mkdir(exist_ok=True)
        write_json(self.root / "pipeline.json", {"schema_version": 1, "status": status, "stages": records})

    @staticmethod
    def add(run, *rows, name="metrics.jsonl"):
        with (run / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    @staticmethod
    def live(run, step, steps, times):
        record = LiveRecord(run, "RL", step, steps, times[0][0] if times else 0.0, times)
        record._write()
