"""A pipeline of tiny stages under random kills, signals and full disks, again and again: `make soak HOURS=2`.

Each round runs the pipeline in a new folder until it is done. Every start but the last of a round is disturbed at a
random moment. A round must end with the bytes of a quiet run, with nothing left behind.

    python tests/torture/soak.py HOURS
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import conftest  # noqa: E402, F401 - makes a bare checkout importable
import planted  # noqa: E402
from ledger import recorded  # noqa: E402
from processes import alive, children_of  # noqa: E402
from waiting import lasting, pause, seconds_of, wait_for  # noqa: E402
from world import World, files_of, hidden  # noqa: E402
from zygote import FULL, Fault, Run, Zygote, has_compiler, zygote  # noqa: E402

from gemma2.core.outputs.staging import fault_of  # noqa: E402

LEARN = "learning_rate: 1e-3, warmup_steps: 0, save_every: 1"
SHORT = "max_new_tokens: 16, temperature: 1"
RL = f"""{{policy: "${{student.out}}", reward: ["${{judge.out}}"], prompts: prompts.jsonl, {LEARN}, {SHORT},
              steps: 3, mu: 0.3, prompts_per_step: 2, n: 3, eval_prompts: 4, seed: SEED}}"""
PIPELINE = f"""
resources: {{cpus: 1}}
stages:
  answers:
    command: generate
    options: {{teacher: policy, prompts: prompts.jsonl, n: 2, {SHORT}, keep_truncated: true, batch_size: 4}}
  kept:
    command: filter
    options: {{data: "${{answers.out}}", min_words: 0}}
  sft:
    command: sft
    options: {{model: policy, data: "${{kept.out}}", max_steps: 4, batch_size: 2, {LEARN}}}
  student:
    command: distill
    options: {{model: "${{sft.out}}", teacher: other, prompts: prompts.jsonl, steps: 3, batch_size: 2, eval_prompts: 2,
              {LEARN}, {SHORT}}}
  judge:
    command: reward
    options: {{model: policy, data: pairs.jsonl, max_steps: 3, batch_size: 2, {LEARN}}}
  rl-1:
    command: rlhf
    options: {RL.replace("SEED", "1")}
  rl-2:
    command: rlhf
    options: {RL.replace("SEED", "2")}
  merged:
    command: merge slerp
    options: {{models: ["${{rl-1.out}}", "${{rl-2.out}}"]}}
  front:
    command: pareto
    options: {{policies: ["${{rl-1.out}}", "${{rl-2.out}}", "${{merged.out}}"], sft: "${{student.out}}",
              prompts: prompts.jsonl, reward: ["${{judge.out}}"], {SHORT}, limit: 4}}
"""
MOST = 12  # disturbances of one round
DISTURBANCES = (
    "kill -9 of the scheduler",
    "kill -9 of everything",
    "kill -9 of a stage",
    "SIGTERM",
    "SIGINT",
    "full disks",
)
CODES = {"SIGTERM": {143}, "SIGINT": {130}, "full disks": {1}, "kill -9 of a stage": {1}}


class Soak:
    """The pipeline, its quiet run, and rounds that are compared with it."""

    def __init__(self, parent: Zygote, root: Path, chance: random.Random) -> None:
        self.parent, self.root, self.chance = parent, root, chance
        self.world = World(root)
        (root / "soak.yaml").write_text(PIPELINE, encoding="utf-8")
        self.counts: Counter[str] = Counter()
        self.out = root / "quiet" / "out"
        self.out.parent.mkdir()
        self.seconds = seconds_of(self._to_the_end)
        self.expected = files_of(self.out)

    def start(self, before: str = "", fault: Fault | None = None) -> Run:
        """Start the pipeline in the folder of this round."""
        words = ("pipeline", "run", "soak.yaml", "--quiet", "--out", self.out, "--jobs", self.chance.choice((1, 2)))
        place = {"folder": self.root, "environment": {"PYTHONPATH": str(self.root)}}
        return self.parent.start(*words, before=planted.call("forked_stages") + before, fault=fault, **place)

    def _to_the_end(self) -> None:
        code, _, err = self.start().finish()
        assert code == 0, err

    def round(self, number: int) -> None:
        """Run the pipeline until it is done, disturbed on the way."""
        self.out = self.root / f"round-{number}" / "out"
        self.out.parent.mkdir()
        for _ in range(self.chance.randint(1, MOST)):
            code = self._disturbed(self.chance.choice(DISTURBANCES))
            self.counts["starts"] += 1
            if code == 0:
                break
        self._to_the_end()
        self.counts["starts"] += 1
        found = files_of(self.out)
        different = sorted(name for name in found.keys() | self.expected if found.get(name) != self.expected.get(name))
        assert different == [], f"round {number}: {different}"
        assert fault_of(self.out) == ""
        assert hidden(self.out.parent) == []
        shutil.rmtree(self.out.parent)
        self.counts["rounds"] += 1

    def _disturbed(self, what: str) -> int:
        """One start with one disturbance; its exit code."""
        fault, before = None, ""
        if what == "full disks" and has_compiler():
            fault = Fault(self.root, self.chance.randrange(120), FULL)
        elif what == "full disks":
            before = planted.call("longest_file", self.chance.randrange(1, 200_000))
        process = self.start(before, fault)
        if what != "full disks":
            pause(self.chance.uniform(0, self.seconds))
        if what == "kill -9 of a stage":
            self._kill(set(self.chance.sample(sorted(found), 1)) if (found := children_of(process.pid)) else set())
        elif what == "kill -9 of everything":
            others = children_of(process.pid)
            process.send_signal(signal.SIGKILL)
            self._kill(others)
        elif what != "full disks":
            process.send_signal(signal.SIGKILL if "kill" in what else getattr(signal, what))
        code, _, err = process.finish()
        assert "Traceback" not in err, err
        number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(what, signal.SIGKILL)
        # A signal before the handlers are there, or when the work is over, has its default action.
        assert code in {0, -number} | CODES.get(what, set()), (what, code, err)
        logs = "".join(path.read_text("utf-8", "replace") for path in self.out.glob("logs/*"))
        assert "Traceback" not in logs, logs[-3000:]
        wait_for(lambda: not alive(children_of(self.parent.pid)))
        self.counts[what if code else "ended before it"] += 1
        return code

    def _kill(self, pids: set[int]) -> None:
        for pid in alive(pids):
            os.kill(pid, signal.SIGKILL)


def soak(seconds: float) -> None:
    """Rounds until the time is over; the figures are printed, and kept where a ledger is named."""
    going = lasting(seconds)
    seed = random.randrange(10**9)
    sys.stdout.write(f"soak with seed {seed}\n")
    with ExitStack() as held:
        root = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        figures = held.enter_context(
            recorded("soak: a pipeline of nine stages until its bytes are those of a quiet run")
        )
        parent = held.enter_context(zygote(calls=has_compiler()))
        one = Soak(parent, root, random.Random(seed))
        while not one.counts["rounds"] or going():
            one.round(one.counts["rounds"] + 1)
            sys.stdout.write(f"round {one.counts['rounds']}: {one.counts['starts']} starts so far\n")
            sys.stdout.flush()
        figures |= dict(one.counts)


if __name__ == "__main__":
    soak(3600 * float(sys.argv[1]) if len(sys.argv) > 1 else 7200)
