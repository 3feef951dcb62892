"""Claim: the filters that `gemma2 filter` uses by default drop hardly a row wrongly: precision >= 0.95 for each.

    python bench/filter_quality.py [--peers PYTHON] [--json FILE] [--wrong]

The rows are those of tests/posttrain/filters/labelled (README.md there): texts with the verdict that a filter should
give. A fixed hash puts a row into the development half, with which the filters were worked on, or into the test half;
both are shown. `none.jsonl` (code, mathematics, poetry) counts for every filter as rows that should stay.

Next to each filter are peers that run in another interpreter (bench/filter_peers.py, `make bench-filters` installs
them); one that is not installed is skipped with a line. Recall by language follows, then, with --wrong, each row that a
filter gets wrong.

    precision = rightly dropped / dropped        recall = rightly dropped / rows that should be dropped
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2.posttrain.data.sources import Row
from gemma2.posttrain.filters.chunks import ChunkStore
from gemma2.posttrain.filters.decide import decide
from gemma2.posttrain.filters.scan import STAYS, Scanner
from gemma2.posttrain.schemas import FilterConfig

ROOT = Path(__file__).parents[1]
LABELLED = ROOT / "tests/posttrain/filters/labelled"
QUESTION = "Can you tell me more about it?"
# File of labelled rows -> settings of the filter under test.
SETTINGS: dict[str, dict[str, Any]] = {
    "personal": {"filters": ("personal",)},
    "secret": {"filters": ("personal",)},
    "identity": {"filters": ("identity",)},
    "repetition": {"filters": ("repetition",)},
    "near-duplicate": {"filters": ("duplicate", "near-duplicate")},
    "language": {"filters": ("language",), "language": ("en",)},
    "unsafe": {"filters": ("unsafe",), "unsafe_words": ("general", "sexual", "slurs")},
    "refusal": {"filters": ("refusal",), "max_refusal_share": 0.0},
    "disclaimer": {"filters": ("disclaimer",), "drop_disclaimers": True},
}
DEFAULTS = ("personal", "secret", "identity", "repetition", "near-duplicate")
HALVES = ("development", "test")

Labelled = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """Counts of rows: dropped rightly, dropped wrongly, kept wrongly."""

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float:
        """Return the share of dropped rows that should be dropped; 1 if none was dropped."""
        return self.right / (self.right + self.wrong) if self.right + self.wrong else 1.0

    @property
    def recall(self) -> float:
        """Return the share of the rows that should be dropped; 1 if there are none."""
        return self.right / (self.right + self.missed) if self.right + self.missed else 1.0


def labelled(name: str) -> list[Labelled]:
    """Return the rows of a file, and the rows of none.jsonl as further rows that should stay."""
    lines = (LABELLED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if name in ("none", "near-duplicate"):
        return rows
    others = labelled("none")
    return rows + [row for row in others if name != "language" or row["language"] == "en"]


def half(row: Labelled) -> str:
    """Return the half of a row: by the first byte of BLAKE2b of its texts."""
    texts = [row.get(key, "") for key in ("prompt", "text", "other_prompt", "other")]
    return HALVES[hashlib.blake2b("\0".join(texts).encode()).digest()[0] % 2]


def verdicts(name: str, rows: list[Labelled], **more: Any) -> list[bool]:
    """Return for each row whether the filter drops it; of a pair the second row."""
    config = FilterConfig(data=Path("rows"), **(SETTINGS[name] | more))
    scanner = Scanner(config, None)
    with tempfile.TemporaryDirectory() as directory:
        return [_drops(scanner, config, row, Path(directory) / str(place)) for place, row in enumerate(rows)]


def _drops(scanner: Scanner, config: FilterConfig, row: Labelled, directory: Path) -> bool:
    answers = [(row.get("prompt", QUESTION), row["text"])]
    if "other" in row:
        answers.append((row["other_prompt"], row["other"]))
    found = scanner.scan([Row("row", {"prompt": asked, "completion": said}) for asked, said in answers])
    if len(answers) == 1:
        return bool(found.refuses[0]) if "refusal" in config.filters else bool(found.codes[0] != STAYS)
    store = ChunkStore(directory)
    store.append(found)
    return bool(decide(store, config).codes[-1] != STAYS)


def score(rows: list[Labelled], found: list[bool]) -> Score:
    """Count the verdicts on rows."""
    pairs = [(bool(row["label"]), drops) for row, drops in zip(rows, found, strict=True)]
    return Score(pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False)))


def peers(python: Path | None, rows: dict[str, list[Labelled]]) -> dict[str, dict[str, list[bool]]]:
    """Return file -> peer -> verdicts, by another interpreter; prints the peers that are missing."""
    if python is None or not python.exists():
        print("peers: skipped, `make bench-filters` installs them; without it give --peers PYTHON")
        return {}
    script = Path(__file__).with_name("filter_peers.py")
    answer = subprocess.run([python, script], input=json.dumps(rows), capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    for name, reason in found.pop("missing").items():
        print(f"peer {name}: skipped, {reason}")
    return dict(found)


def table(
    rows: dict[str, list[Labelled]], ours: dict[str, list[bool]], theirs: dict[str, dict[str, list[bool]]]
) -> Any:
    """Print precision and recall per filter, by half, next to its peers; return them."""
    figures: dict[str, Any] = {}
    print(f"\n{'filter':<16}{'by':<14}{'rows':>5}  {'development':^17}  {'test':^17}  {'all':^17}")
    print(f"{'':<35}" + f"  {'precision  recall':^17}" * 3)
    for name, judged in rows.items():
        for by, found in [("gemma2", ours[name]), *theirs.get(name, {}).items()]:
            scores = {"all": score(judged, found)}
            for side in HALVES:
                chosen = [place for place, row in enumerate(judged) if half(row) == side]
                scores[side] = score([judged[i] for i in chosen], [found[i] for i in chosen])
            cells = "".join(f"  {scores[k].precision:^9.2f} {scores[k].recall:^7.2f}" for k in (*HALVES, "all"))
            mark = " *" if by == "gemma2" and name in DEFAULTS else ""
            print(f"{name if by == 'gemma2' else '':<16}{by:<14}{len(judged):>5}{cells}{mark}")
            figures.setdefault(name, {})[by] = {k: (s.precision, s.recall) for k, s in scores.items()}
    print("* on by default")
    return figures


def by_language(rows: dict[str, list[Labelled]], ours: dict[str, list[bool]]) -> None:
    """Print the rows found of those that should be, per filter and language."""
    print("\nfound / labelled, by language")
    for name, judged in rows.items():
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for row, drops in zip(judged, ours[name], strict=True):
            if row["label"]:
                counts[row["language"]][0] += drops
                counts[row["language"]][1] += 1
        print(f"{name:<16}" + "  ".join(f"{code} {a}/{b}" for code, (a, b) in sorted(counts.items())))


def own_language(rows: list[Labelled]) -> None:
    """Print the rows that `--language CODE` drops though the text is in the language CODE."""
    written = [row for row in rows if row["label"] and row["kind"] != "late"]
    lost = [row["language"] for row in written if any(verdicts("language", [row], language=(row["language"],)))]
    print(f"\n--language with the text's own code drops {len(lost)} of {len(written)} texts {' '.join(lost)}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="a Python interpreter that has the libraries of filter_peers.py")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--wrong", choices=[*HALVES, "all"], help="list the rows of a half that a filter gets wrong")
    parser.add_argument("--only", choices=list(SETTINGS), action="append", help="only these files of rows")
    chosen = parser.parse_args()
    rows = {name: labelled(name) for name in chosen.only or SETTINGS}
    ours = {name: verdicts(name, judged) for name, judged in rows.items()}
    figures = table(rows, ours, peers(chosen.peers, rows))
    by_language(rows, ours)
    if "language" in rows:
        own_language(rows["language"])
    if chosen.wrong:
        for name, judged in rows.items():
            for row, drops in zip(judged, ours[name], strict=True):
                if bool(row["label"]) != drops and chosen.wrong in ("all", half(row)):
                    text = (row.get("other") or row["text"])[:110].replace("\n", "\\n")
                    print(f"{'kept' if row['label'] else 'lost'} {name} {row['language']} {row['kind']}: {text}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
