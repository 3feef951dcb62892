"""A merge of the 2B shape that is killed, interrupted, refused by the disk, raced and repeated; counts of what it left.

    python bench/torture.py                                  three checkpoints of 5.2 GB are written first
    python bench/torture.py --layers 1 --vocabulary 4096     a small one, to try the script

After every blow the place of the output holds nothing, the old output or the new one, each whole by its digests; and
the next run succeeds with the same bytes and leaves no temporaries. Ends with an error at the first that does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from shapes import layout, write_random

from gemma2.core.outputs.hashing import digest_file

MAIN = "from gemma2.cli.main import main\nmain()\n"


class Torture:
    """One set of models, and what their merges by `slerp` (new) and `linear` (old) are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = root / "out"
        self.dice = random.Random(0)
        self.run("linear")
        self.old = self.digests()
        self.seconds = self.run("slerp", "--force")
        self.new = self.digests()
        shutil.rmtree(self.out)

    def start(self, method: str, *more: str, largest: int | None = None) -> subprocess.Popen[str]:
        """A merge by the command line, in a process that writes no file beyond `largest` bytes."""

        def limit() -> None:
            if largest is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

        base = [] if method == "linear" else ["--base", str(self.root / "base")]
        models = [str(self.root / name) for name in ("rl-1", "rl-2")]
        words = ["merge", method, *models, *base, "--out", str(self.out), "--quiet", *more]
        command = [sys.executable, "-c", MAIN, *words]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, preexec_fn=limit, **pipes)  # type: ignore[call-overload,no-any-return]

    def run(self, method: str, *more: str) -> float:
        """A merge that must succeed; its seconds."""
        begin = time.perf_counter()
        child = self.start(method, *more)
        _, err = child.communicate()
        self.check(child.returncode == 0, f"exit {child.returncode}: {err}")
        self.check(not self.temporaries(), f"left {self.temporaries()}")
        return time.perf_counter() - begin

    def check(self, fine: bool, what: str) -> None:
        """Stop at the first broken promise."""
        if not fine:
            raise SystemExit(f"broken: {what}")

    def temporaries(self) -> list[str]:
        """Hidden files and folders beside the output."""
        return sorted(path.name for path in self.root.glob(".*"))

    def digests(self) -> dict[str, str]:
        """Digest of each file of the output but the manifest, which must tell the same."""
        files = sorted(path for path in self.out.iterdir() if path.name != "gemma2.json")
        found = {path.name: digest_file(path, 2) for path in files}
        manifest = json.loads((self.out / "gemma2.json").read_text())
        told = {name: entry.get("digest") for name, entry in manifest["files"].items()}
        self.check(manifest["status"] == "complete" and told == found, "files and manifest differ")
        return found

    def state(self) -> str:
        """What stands in the place of the output."""
        if not self.out.exists():
            return "nothing"
        found = self.digests()
        self.check(found in (self.old, self.new), "neither the old output nor the new one")
        return "old" if found == self.old else "new"

    def strike(self, number: int, force: bool) -> tuple[str, int]:
        """Send a signal at a random moment of a run; the state after it, and the exit code."""
        if force:
            self.run("linear", "--force")
        child = self.start("slerp", *(["--force"] if force else []))
        time.sleep(self.dice.uniform(0, 1.05 * self.seconds))
        child.send_signal(number)
        _, err = child.communicate()
        self.check("Traceback" not in err, err)
        return self.state(), child.returncode

    def kills(self, count: int, force: bool) -> Counter[str]:
        """kill -9, then a run that succeeds."""
        counts: Counter[str] = Counter()
        for _ in range(count):
            state, _ = self.strike(signal.SIGKILL, force)
            self.check(not force or state != "nothing", "the old output is gone")
            counts[f"{state} there"] += 1
            counts["left temporaries"] += bool(self.temporaries())
            self.run("slerp", "--force")
            self.check(self.state() == "new", "the next run made something else")
            shutil.rmtree(self.out)
        return counts

    def signals(self, number: int, count: int) -> Counter[str]:
        """SIGTERM or SIGINT: exit code, and nothing left at once."""
        counts: Counter[str] = Counter()
        for _ in range(count):
            state, code = self.strike(number, force=False)
            # -number: before the handler is there, or after it was given back at the end.
            self.check(code in (0, 128 + number, -number), f"exit {code}")
            self.check(not self.temporaries(), f"left {self.temporaries()}")
            counts[f"exit {code}"] += 1
            counts[f"{state} there"] += 1
            shutil.rmtree(self.out, ignore_errors=True)
        return counts

    def full_disks(self, count: int) -> Counter[str]:
        """The system refuses to make a file as long as it must be: one line, the old output as it was."""
        counts: Counter[str] = Counter()
        self.run("linear", "--force")
        size = max(path.stat().st_size for path in self.out.iterdir())
        for _ in range(count):
            child = self.start("slerp", "--force", largest=self.dice.randrange(1, size))
            _, err = child.communicate()
            self.check(child.returncode == 1 and err.count("\n") == 1 and err.startswith("error: "), err)
            self.check(self.state() == "old" and not self.temporaries(), "something is left")
            counts["refused in one line"] += 1
        shutil.rmtree(self.out)
        return counts

    def pairs(self, count: int) -> Counter[str]:
        """Two runs to one place: one wins, the other fails in one line."""
        counts: Counter[str] = Counter()
        for _ in range(count):
            children = [self.start("slerp"), self.start("linear")]
            ends = [(child.communicate()[1], child.returncode) for child in children]
            self.check(sorted(code for _, code in ends) == [0, 1], str(ends))
            self.check(all(err.count("\n") == 1 for err, code in ends if code), str(ends))
            counts[f"{self.state()} there"] += 1
            shutil.rmtree(self.out)
        return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--count", type=int, default=10, help="of each kind of blow")
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: the system's temporary place)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root = Path(name)
        shapes = layout(layers=options.layers, vocabulary=options.vocabulary)
        for seed, model in enumerate(("base", "rl-1", "rl-2")):
            write_random(root / model, shapes, seed)
        torture = Torture(root)
        size = (root / "base/model.safetensors").stat().st_size / 1e9
        print(f"one model: {size:.2f} GB; an undisturbed run: {torture.seconds:.1f} s")
        for label, counts in (
            ("kill -9", torture.kills(options.count, force=False)),
            ("kill -9 of --force", torture.kills(options.count, force=True)),
            ("SIGTERM", torture.signals(signal.SIGTERM, options.count)),
            ("SIGINT", torture.signals(signal.SIGINT, options.count)),
            ("disk refuses", torture.full_disks(options.count)),
            ("two at once", torture.pairs(options.count)),
        ):
            print(f"{label:20}{options.count:4}  {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}")


if __name__ == "__main__":
    main()
