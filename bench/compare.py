"""The same small recipes on two commits: outputs, metrics and hashes bit for bit.

    python bench/compare.py A B [--assert-equal] [--prose] [--only NAME ...] [--keep DIR]
    python bench/compare.py HEAD . --assert-equal

A and B are git revisions, or folders with a checkout; `.` or WORKTREE is the working tree of this repository. Revisions
are checked out with `git worktree add --detach` into a temporary folder and removed at the end. Both sides use the
Python environment that this script runs in.

Only the command line is used, so the modules of A and B may have nothing in common. On PYTHONPATH lies a folder with a
link `gemma2` to the checkout. The installed `gemma2` is a part of the same namespace; sitecustomize.py in that folder
takes it out, so that no module of it can stand in for one that a checkout lacks.

The recipes (bench/recipes.py) run side by side, one thread each. Every file that they write is compared, and what each
command writes to stdout with --json (bench/trees.py). What may differ, and why:

    time of day          started, ended in gemma2.json, pipeline.json and --json; dates in report pages
    duration             seconds in pipeline.json and --json; durations in report pages
    free disk            bytes_free in --json of a plan
    version of gemma2    gemma2, versions.gemma2; every other package has to be the same
    other files          size and digest in gemma2.json of README.md, *.html and pipeline.json, which are files compared
                         by these rules
    absolute paths       the folder that a side works in reads <root> in both

Model cards (README.md), report pages (*.html), and notes and warnings in JSON hold sentences, which may be reworded
without any change of a number. So they are compared as text and reported as "prose differs", which counts as a
difference with --prose alone. How many notes and warnings there are counts always.

Results of a CPU are compared with results of the same CPU. Recipes that --only names bring along those that they need.
A difference spreads to the recipes that read its output, so the first one in the table tells most. About five minutes
on two cores, of which half train the embedded models.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where a test loads this file by its path

from recipes import JUDGE, RECIPES, Recipe, with_needs
from trees import Comparison, Difference, compare_trees

ROOT = Path(__file__).resolve().parents[1]
WORKTREE = ("WORKTREE", ".")
MAIN = "from gemma2.cli.main import main; main()"
PLAIN = "pipeline graph"  # knows no --json
INTERRUPTED = 130  # exit code
LIMIT = 900  # seconds of one command
LISTED = 12  # differences shown per recipe
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "120",
}


# --- one side -------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """A checkout and the folder that its commands run in."""

    name: str
    checkout: Path
    folder: Path
    failures: list[Difference] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """The current directory of every command; what is in it is compared."""
        return self.folder / "work"

    def prepare(self) -> None:
        """Make the folders, and check that it is this checkout which is imported."""
        for name in ("path", "work", "stderr"):
            (self.folder / name).mkdir(parents=True)
        path = self.folder / "path"
        (path / "gemma2").symlink_to(self.checkout)
        only = f"import gemma2\n\ngemma2.__path__ = [{str(path / 'gemma2')!r}]\n"
        (path / "sitecustomize.py").write_text(only, encoding="utf-8")
        (path / "scores.py").write_text(JUDGE, encoding="utf-8")
        done = self.python("import gemma2.cli.main as module; print(module.__file__)", [])
        if done.returncode or not Path(done.stdout.strip()).resolve().is_relative_to(self.checkout.resolve()):
            raise SystemExit(f"{self.name}: gemma2 cannot be imported from {self.checkout}\n{done.stdout}{done.stderr}")

    def python(self, script: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a script in an interpreter that sees this checkout."""
        own = {"PYTHONPATH": str(self.folder / "path"), "XDG_CACHE_HOME": str(self.folder / "cache")}
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=self.work,
            env=os.environ | ENVIRONMENT | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def run(self, name: str, recipe: Recipe) -> float:
        """Run the commands of a recipe; returns the seconds that they took."""
        place = self.work / name
        place.mkdir()
        for file, text in recipe.files.items():
            (self.work / file).write_text(text, encoding="utf-8")
        started = time.perf_counter()
        try:
            if recipe.prepare:
                recipe.prepare(self.work)
        except OSError as error:  # an input was not made, which its own recipe reports
            self.failures.append(Difference(name, f"{self.name}: {error}"))
            return time.perf_counter() - started
        for number, line in enumerate(recipe.commands, start=1):
            done = self.python(MAIN, shlex.split(line) + ["--json"] * (not line.startswith(PLAIN)))
            (place / f"stdout-{number}.json").write_text(done.stdout, encoding="utf-8")
            (self.folder / "stderr" / f"{name}-{number}.txt").write_text(done.stderr, encoding="utf-8")
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                self.failures.append(Difference(f"gemma2 {line}", f"exit {done.returncode} in {self.name}: {last}"))
            if done.returncode == INTERRUPTED:
                break
        return time.perf_counter() - started


# --- checkouts ------------------------------------------------------------------------------------------------------


def git(*words: str) -> str:
    """What a git command prints. Raises SystemExit with its message where it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checkout(given: str, place: Path) -> Iterator[tuple[Path, str]]:
    """(folder of a checkout, its name); a revision is checked out to `place` and removed afterwards."""
    if given in WORKTREE:
        yield ROOT, "the working tree"
    elif (Path(given) / "pyproject.toml").is_file():
        yield Path(given).resolve(), given
    else:
        commit = git("rev-parse", "--verify", "--end-of-options", f"{given}^{{commit}}")
        git("worktree", "add", "--quiet", "--detach", str(place), commit)
        try:
            yield place, f"{given} ({commit[:10]})"
        finally:
            git("worktree", "remove", "--force", str(place))


@contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """Where both sides work: a temporary folder, or one that is kept and must be new."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="compare-") as folder:
            yield Path(folder).resolve()
    else:
        if keep.exists() and any(keep.iterdir()):
            raise SystemExit(f"--keep {keep} exists and is not empty: name a new folder")
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()


# --- table ----------------------------------------------------------------------------------------------------------


def verdict(found: Comparison) -> str:
    """One word or a few on a recipe."""
    told = f"{len(found.differences)} differ" if found.differences else "equal"
    return f"{told}, prose differs" if found.prose else told


def show(name: str, found: Comparison, seconds: Sequence[float]) -> None:
    """A row of the table, and the differences below it."""
    took = "".join(f"{value:8.1f}" for value in seconds)
    print(f"{name:<14}{found.files:>6}  {verdict(found):<24}{took}", flush=True)
    for kind, differences in (("", found.differences), ("prose: ", found.prose)):
        for difference in differences[:LISTED]:
            print(f"    {kind}{difference}", flush=True)
        if len(differences) > LISTED:
            print(f"    {kind}and {len(differences) - LISTED} more files", flush=True)


def compared(sides: Sequence[Side], names: Sequence[str]) -> list[Comparison]:
    """Run the recipes on both sides at once and show each when it is done."""
    print(f"{'recipe':<14}{'files':>6}  {'':<24}{'A, s':>8}{'B, s':>8}", flush=True)
    found = []
    with ThreadPoolExecutor(len(sides)) as pool:
        for name in names:
            for side in sides:
                side.failures.clear()
            seconds = list(pool.map(lambda side, name=name: side.run(name, RECIPES[name]), sides))
            one = compare_trees(*(side.work for side in sides), folders=[name])
            one.differences[:0] = [failure for side in sides for failure in side.failures]
            show(name, one, seconds)
            found.append(one)
    return found


def arguments() -> argparse.Namespace:
    listed = "\n".join(f"    {name:<15} {recipe.covers}" for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"recipes:\n{listed}"
    )
    parser.add_argument("a", metavar="A", help="revision, folder of a checkout, or WORKTREE")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--assert-equal", action="store_true", help="exit 1 when anything differs")
    parser.add_argument("--prose", action="store_true", help="reworded cards, pages, notes and warnings count too")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=RECIPES, default=list(RECIPES), help="recipes")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder that keeps the outputs of both sides")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    started = time.perf_counter()
    with ExitStack() as stack:
        folder = stack.enter_context(working_folder(options.keep))
        places = stack.enter_context(tempfile.TemporaryDirectory(prefix="checkouts-"))
        sides = []
        for name, given in (("A", options.a), ("B", options.b)):
            path, title = stack.enter_context(checkout(given, Path(places).resolve() / name.lower()))
            print(f"{name}: {title}", flush=True)
            sides.append(Side(name, path, folder / name.lower()))
            sides[-1].prepare()
        found = compared(sides, with_needs(options.only))
    counted = sum(len(one.differences) + options.prose * len(one.prose) for one in found)
    files, prose = sum(one.files for one in found), sum(len(one.prose) for one in found)
    print(f"{files} files, {counted} differences, {prose} of prose, {time.perf_counter() - started:.0f} s")
    if options.assert_equal and counted:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
