"""25-shot multiple choice: `gemma2 eval --suite` next to lm-eval's HFLM, on the same rows, model and cores.

    python bench/eval.py [--model DIR] [--rows 4] [--runs 2]            needs the extra `eval`

One table: seconds per pass over the rows (median of the runs, interleaved), and the ratio to HFLM at its better batch
size. The run fails below 2.5 x, for a log-likelihood further than 1e-4 from HFLM's, or for another metric. Without
--model: random weights in the shapes of the embedded student.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from gemma2.posttrain.evaluation.suite.encoding import Encoder
from gemma2.posttrain.evaluation.suite.grading import grade_choices
from gemma2.posttrain.evaluation.suite.prompts import Asked, asked_of
from gemma2.posttrain.evaluation.suite.shared_scoring import SharedScorer
from gemma2.posttrain.evaluation.suite.task import load_task
from gemma2.posttrain.evaluation.suite.task_rows import TaskRows
from gemma2.posttrain.models.loading import load_policy, quiet_libraries
from gemma2.posttrain.tiny.networks import save_random

LEAST = 2.5
STUDENT = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
}


def questions(count: int, dice: random.Random, words: list[str]) -> list[dict[str, object]]:
    """Rows in the shape and the usual lengths of ARC-challenge: 30 words, four choices of 2 to 6."""

    def text(least: int, most: int) -> str:
        return " ".join(dice.choice(words) for _ in range(dice.randint(least, most)))

    return [
        {
            "id": number,
            "split": "test",
            "question": f"{text(18, 42)}?",
            "choices": [text(2, 6) for _ in range(4)],
            "answer": dice.randrange(4),
        }
        for number in range(count)
    ]


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def of_hflm(lm: HFLM, asked: list[Asked], encoder: Encoder) -> list[list[float]]:
    """Log-likelihoods of the choices by lm-eval."""
    asks = [
        Instance(request_type="loglikelihood", doc={}, arguments=(encoder.with_bos(context), ending), idx=number)
        for row in asked
        for number, (context, ending) in enumerate(row.pairs)
    ]
    found = iter(lm.loglikelihood(asks, disable_tqdm=True))
    return [[next(found)[0] for _ in row.continuations] for row in asked]


def of_ours(scorer: SharedScorer, asked: list[Asked], encoder: Encoder) -> list[list[float]]:
    """The same by the suite, encoding included."""
    return [values for _, batch in scorer.group(encoder.choices(asked)) for values in batch]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory; default: random weights of the student's shapes")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or save_random(Path(folder) / "student", 0, **STUDENT)
        model, tokenizer = load_policy(path)
        lms = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in (1, 8)}
    # Words of one token, as most words are in Gemma's vocabulary.
    texts = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    words = [text[1:] for text in texts if text[:1] == " " and text[1:].isalpha() and len(text) > 2]
    dice, task = random.Random(0), load_task("arc_challenge")
    rows = TaskRows(task, questions(options.rows, dice, words), {"": questions(200, dice, words)}, "test", "train")
    asked, encoder = [*asked_of(rows, 1234)], Encoder(tokenizer, 8192)
    scorer = SharedScorer(model, 16)
    passes: dict[str, Callable[[], list[list[float]]]] = {
        f"lm-eval HFLM, batch {size}": lambda lm=lm: of_hflm(lm, asked, encoder) for size, lm in lms.items()
    }
    passes["gemma2 eval --suite"] = lambda: of_ours(scorer, asked, encoder)
    values = {name: work() for name, work in passes.items()}  # the first pass warms up, and is compared
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(options.runs):
        for name, work in passes.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(found) for name, found in times.items()}
    *theirs, ours = medians
    best = min(medians[name] for name in theirs)
    tokens = sum(len(request.ids) for row in encoder.choices(asked) for request in row) / sum(
        len(r.pairs) for r in asked
    )
    print(f"{options.rows} questions, 25 examples, {tokens:.0f} tokens per request")
    for name, median in medians.items():
        print(f"{name:<24} {median:8.2f} s   {best / median:5.2f} x")
    worst = max(
        abs(a - b)
        for name in theirs
        for left, right in zip(values[name], values[ours], strict=True)
        for a, b in zip(left, right, strict=True)
    )
    grades = [[grade_choices(task, row, lls) for row, lls in zip(asked, values[name], strict=True)] for name in passes]
    same = all(found == grades[0] for found in grades)
    print(f"largest difference of a log-likelihood: {worst:.1e}; acc and acc_norm {'equal' if same else 'DIFFER'}")
    return 0 if same and worst < 1e-4 and best / medians[ours] >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
