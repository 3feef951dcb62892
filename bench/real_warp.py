"""WARP on real weights: SmolLM2-135M-Instruct, a verifiable reward, seven claims with a rule fixed beforehand.

    python bench/real_warp.py [--out runs/real-warp] [--gsm8k FILE] [--jobs 2] [--rehearsal]

The task is in tasks.py: one short sentence with two given words; words to train on and held-out words are disjoint.

    base     SmolLM2-135M-Instruct from the 4-bit GGUF file of the package index
    sft      base, fine-tuned on the best of four of its own answers to 400 prompts (best by the reward)
    rl-1..4  RL from sft, 4 prompts x 4 samples, 32 steps, EMA anchor with mu T = 4, beta 0.05, four seeds
    slerp-a, slerp-b, linear-a, linear-b      merges of rl-1 and rl-2, of rl-3 and rl-4
    liti-a, liti-b                            half-way from sft to either SLERP
    rl-6, rl-7, slerp-2                       the second iteration of WARP, from liti-a
    rl-5     RL from sft for 128 steps: as many completions as the four runs of two iterations
    fronts   400 held-out prompts, one answer each, common random numbers, exact KL per position

Why 16 completions a step: the noise that merging averages away has the share of the task vectors that their number
leaves (docs/warp.md, "Why 56 degrees"); it was fixed before any figure of a merge was seen, as was all else here. Full
fp32 weights, temperature 0.7 throughout: at 1 this 4-bit model babbles, and RL would spend its KL on the tail.

The rule. The unit is a prompt; differences are paired by prompt; errors are those of a bootstrap over prompts (10,000
resamples) inside the fixed set of runs. A claim HOLDS when the difference, pooled over its replicates, is more than
three errors above zero and every replicate has the sign; it FAILS when that is so for the other sign; else the two are
NOT TOLD APART. One look: what is repeated or changed afterwards is said in docs/real.md.

    C1  reward(sft) - reward(base) > 0                                              1 replicate
    C2  reward(RL) - reward(sft) > 0                                                4 replicates: rl-1 .. rl-4
    C3  reward(SLERP) - mean reward of its two runs > 0                             2 replicates: disjoint pairs
    C4  KL(SLERP) - KL(LERP) > 0; angle of the task vectors, norm of the merges     2 replicates
    C5  reward at equal KL, line from sft to SLERP - trajectories of its runs > 0   2 replicates
    C6  hypervolume, the line of iteration 2 - the trajectory of rl-5 > 0           1 replicate
    C7  loss of base's own answers to plain questions, RL - LITI > 0                2 replicates

Curves are compared at the corners of either one (bench/findings.py): with those of the line C5 and C6 can only be too
high for the line, with those of the trajectory only too low. They hold by the low one and fail by the high one.

Every step is a `gemma2` command in a process of its own, printed as it could be typed; a finished one is not repeated,
an interrupted one is resumed. --rehearsal walks the same path with two steps a run and 8 prompts, and claims nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from findings import Curve, Floats, extent, gap
from real import Step, answer, gguf_file, perform_all, show_records
from tasks import write_prompts

PROMPTS = Path(__file__).resolve().parent.parent / "posttrain" / "data" / "prompts.jsonl"
REWARD = "--reward-fn tasks:sentence"
SAMPLING = "--temperature 0.7 --max-new-tokens 28"
LIMIT = 3.0  # errors
RESAMPLES = 10_000
SHOWN = 10  # held-out prompts, the first ones
ETAS = "0,0.3,0.6,1"
PAIRS = {"a": ("rl-1", "rl-2"), "b": ("rl-3", "rl-4")}


@dataclass(frozen=True)
class Size:
    """The size of the run."""

    taught: int = 400  # prompts that the data are made from
    sft_steps: int = 40
    steps: int = 32
    longer: int = 4  # times as many steps of rl-5
    held: int = 400
    plain: int = 48  # questions of C7


REHEARSAL = Size(taught=16, sft_steps=2, steps=2, longer=2, held=8, plain=4)


# --- the steps ------------------------------------------------------------------------------------------------------


def steps(size: Size) -> Iterator[Step]:
    """Every command, as typed inside the output directory."""
    yield Step(
        "generate",
        f"generate --teacher base --prompts words.jsonl --limit {size.taught} --n 4 --best 1 {REWARD} {SAMPLING}",
        "data",
    )
    yield Step("filter", "filter data", "clean")
    yield Step(
        "sft",
        f"sft --model base --data clean --max-steps {size.sft_steps} --batch-size 16 --learning-rate 2e-5 "
        "--warmup-ratio 0.1 --eval-fraction 0.1",
        "sft",
    )
    yield _rl(size, "rl-5", "sft", 5, size.steps * size.longer, size.steps)  # the longest: first of those side by side
    for seed in (1, 2, 3, 4):
        yield _rl(size, f"rl-{seed}", "sft", seed, size.steps, size.steps // 2)
    for name, runs in PAIRS.items():
        yield Step(f"slerp {name}", f"merge slerp {' '.join(runs)} --base sft", f"slerp-{name}", resumable=False)
        yield Step(f"linear {name}", f"merge linear {' '.join(runs)}", f"linear-{name}", resumable=False)
        yield Step(f"liti {name}", f"merge liti slerp-{name} --base sft --eta 0.5", f"liti-{name}", resumable=False)
    for seed in (6, 7):
        yield _rl(size, f"rl-{seed}", "liti-a", seed, size.steps, size.steps)
    yield Step("slerp 2", "merge slerp rl-6 rl-7 --base liti-a", "slerp-2", resumable=False)
    measured = f"pareto --sft sft --prompts words-held.jsonl {REWARD} {SAMPLING} --etas {ETAS}"
    yield Step("front a", f"{measured} --policies base,rl-1,rl-2,linear-a,rl-5 --merged slerp-a", "front-a")
    yield Step("front b", f"{measured} --policies rl-3,rl-4,linear-b --merged slerp-b", "front-b")
    yield Step("front 2", f"{measured} --policies rl-6,rl-7 --merged slerp-2", "front-2")
    yield Step(
        "plain answers",
        f"generate --teacher base --prompts plain.jsonl --limit {size.plain} --temperature 0 --max-new-tokens 64 "
        "--keep-truncated",
        "plain",
    )


def _rl(size: Size, name: str, policy: str, seed: int, count: int, every: int) -> Step:
    return Step(
        f"rlhf {name}",
        f"rlhf --policy {policy} --sft sft {REWARD} --prompts words.jsonl --heldout words-held.jsonl --seed {seed} "
        f"--steps {count} --prompts-per-step 4 --n 4 {SAMPLING} --learning-rate 2e-5 --warmup-steps 1 --beta 0.05 "
        f"--mu {min(1.0, 4 / count):g} --eval-every {every} --eval-prompts {size.held} --eval-seed 0 --save-every 16",
        name,
    )


def prepare(directory: Path, size: Size, gsm8k: Path | None) -> None:
    """Write prompts; plain questions are GSM8K's where they are at hand, else the project's."""
    write_prompts(directory, 800, size.held)
    source, column = (PROMPTS, "prompt") if gsm8k is None else (gsm8k, "question")
    with source.open(encoding="utf-8") as file:
        texts = [json.loads(line)[column] for line in itertools.islice(file, size.plain)]
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    (directory / "plain.jsonl").write_text(rows, encoding="utf-8")


# --- what was measured ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Values per held-out prompt, by the name of a policy, (line, eta), or (run, step)."""

    reward: Mapping[object, Floats]
    kl: Mapping[object, Floats]
    loss: Mapping[str, Floats]  # nats per token of base's answer to each plain question
    geometry: Mapping[str, float]


def read_fronts(directory: Path) -> tuple[dict[object, Floats], dict[object, Floats]]:
    """(rewards, KLs) of all points of the three fronts and of the trajectories on them."""
    from gemma2.posttrain.evaluation.front_files import read_entries, read_front

    reward: dict[object, Floats] = {}
    kl: dict[object, Floats] = {}
    for front in ("front-a", "front-b", "front-2"):
        for entry in read_entries(directory / front, read_front(directory / front, "front")):
            place = entry.candidate.models[-1].path.name
            key: object = (place, float(entry.candidate.eta or 0)) if entry.candidate.kind == "line" else place
            reward[key], kl[key] = (np.asarray(entry.values[name], dtype=np.float64) for name in ("reward", "kl"))
            for point in entry.trajectory:
                values = point["values"]
                reward[place, point["step"]] = np.asarray(values["reward"], dtype=np.float64)
                kl[place, point["step"]] = np.asarray(values["kl"], dtype=np.float64)
    return reward, kl


def losses(directory: Path, names: Sequence[str]) -> dict[str, Floats]:
    """Mean nats per token of base's own answers to the plain questions, for each model."""
    from gemma2.posttrain.data.chat import ChatFormat
    from gemma2.posttrain.models.loading import load_policy, quiet_libraries
    from gemma2.posttrain.models.scorer import token_logps

    quiet_libraries()
    rows = [json.loads(line) for line in _lines(directory / "plain")]
    found: dict[str, Floats] = {}
    for name in names:
        model, tokenizer = load_policy(directory / name)
        chat = ChatFormat(tokenizer, model.generation_config)
        prompts = [chat.prompt_ids(row["prompt"]) for row in rows]
        answers = [tokenizer.encode(row["completion"][0]["content"], add_special_tokens=False) for row in rows]
        scored = token_logps(model, prompts, answers, 8)
        found[name] = np.array([-float(logps.mean()) for logps in scored])
    return found


def _lines(directory: Path) -> Iterator[str]:
    for path in sorted(directory.glob("*.jsonl")):
        if not path.name.startswith(("metrics", "rejected", "journal", "skipped", "truncated")):
            yield from path.read_text(encoding="utf-8").splitlines()


def geometry(directory: Path) -> dict[str, float]:
    """Angle between the task vectors of either pair in the blocks, and norms of the merges over theirs."""
    from gemma2.merging.inspect.difference import diff_models

    found: dict[str, float] = {}
    for name, (first, second) in PAIRS.items():
        base = directory / "sft"
        runs = _blocks(diff_models(directory / first, directory / second, base=base).groups)
        merges = _blocks(diff_models(directory / f"slerp-{name}", directory / f"linear-{name}", base=base).groups)
        norm = float(np.mean([(group.task_norm_a + group.task_norm_b) / 2 for group in runs]))
        found[f"angle {name}"] = float(np.mean([group.task_angle for group in runs]))
        found[f"norm of SLERP {name}"] = float(np.mean([group.task_norm_a for group in merges])) / norm
        found[f"norm of LERP {name}"] = float(np.mean([group.task_norm_b for group in merges])) / norm
    return found


def _blocks(groups: Sequence) -> list:  # type: ignore[type-arg]
    return [group for group in groups if group.group.startswith("layers.")]


# --- the claims -----------------------------------------------------------------------------------------------------


def resampled(values: Floats, seed: int = 0) -> Floats:
    """Means over all prompts, then over each resample of them: (n, ...) -> (1 + RESAMPLES, ...)."""
    count = len(values)
    generator = np.random.default_rng(seed)  # one for all: the same resamples everywhere, so differences are paired
    weights = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    return np.concatenate([values.mean(0)[None], weights @ values])


@dataclass(frozen=True)
class Claim:
    """A difference by replicate, (1 + RESAMPLES,) each; high: where it differs, the one by which a claim can fail."""

    name: str
    words: str
    low: Sequence[Floats]
    high: Sequence[Floats] = ()

    def pooled(self, values: Sequence[Floats]) -> tuple[float, float]:
        """(difference, bootstrap error) of the mean over replicates."""
        mean = np.mean(np.stack(list(values)), axis=0)
        return float(mean[0]), float(mean[1:].std(ddof=1))

    def verdict(self) -> str:
        """holds, fails, or not told apart."""
        for values, sign, word in ((self.low, 1, "holds"), (self.high or self.low, -1, "fails")):
            value, error = self.pooled(values)
            if sign * value > LIMIT * error and all(sign * float(one[0]) > 0 for one in values):
                return word
        return "not told apart"


def claims(found: Measured) -> list[Claim]:
    """C1 to C7."""
    reward = {key: resampled(values) for key, values in found.reward.items()}
    kl = {key: resampled(values) for key, values in found.kl.items()}
    loss = {key: resampled(values) for key, values in found.loss.items()}

    def curve(*keys: object) -> Curve:
        return Curve(np.stack([kl[key] for key in keys], 1), np.stack([reward[key] for key in keys], 1))

    def line(merge: str) -> Curve:
        return curve(*sorted(key for key in kl if isinstance(key, tuple) and key[0] == merge))

    def trajectory(run: str) -> Curve:
        stops = sorted(key for key in kl if isinstance(key, tuple) and key[0] == run and key[1] > 0)
        return curve(("slerp-a", 0.0), *stops, run)

    def over(pair: str, of: object) -> tuple[Floats, Floats]:
        a = line(f"slerp-{pair}")
        both = [(of(a.at_kls_of(b), b), of(a, b.at_kls_of(a))) for b in map(trajectory, PAIRS[pair])]  # type: ignore[operator]
        return sum(low for low, _ in both) / 2, sum(high for _, high in both) / 2

    def mean(values: Mapping[object, Floats], keys: Sequence[str]) -> Floats:
        return sum((values[key] for key in keys), np.zeros(())) / len(keys)

    sft = ("slerp-a", 0.0)
    merged = {name: (f"slerp-{name}", 1.0) for name in PAIRS}
    gaps = [over(name, gap) for name in PAIRS]
    second, long = line("slerp-2"), trajectory("rl-5")
    tax = [mean(loss, runs) - loss[f"liti-{name}"] for name, runs in PAIRS.items()]
    return [
        Claim("C1", "reward, SFT − base", [reward[sft] - reward["base"]]),
        Claim("C2", "reward, RL − SFT", [reward[f"rl-{seed}"] - reward[sft] for seed in (1, 2, 3, 4)]),
        Claim("C3", "reward, SLERP − its runs", [reward[merged[k]] - mean(reward, runs) for k, runs in PAIRS.items()]),
        Claim("C4", "KL, SLERP − LERP", [kl[merged[k]] - kl[f"linear-{k}"] for k in PAIRS]),
        Claim("C5", "reward at equal KL, line of SLERP − runs", [low for low, _ in gaps], [high for _, high in gaps]),
        Claim(
            "C6",
            "hypervolume, line of iteration 2 − run of equal compute",
            [extent(second.at_kls_of(long), long)],
            [extent(second, long.at_kls_of(second))],
        ),
        Claim("C7", "loss of plain answers, RL − LITI, nats per token", tax),
    ]


# --- what is written ------------------------------------------------------------------------------------------------


def tables(found: Measured, judged: Sequence[Claim]) -> str:
    """The points, the claims with their verdicts, and the geometry, as Markdown."""
    out = ["| policy | reward | KL, nats |", "| --- | ---: | ---: |"]
    for key in found.reward:
        name = key if isinstance(key, str) else f"{key[0]}, {'eta' if isinstance(key[1], float) else 'step'} {key[1]:g}"  # type: ignore[index]
        cells = [_with_error(resampled(values[key])) for values in (found.reward, found.kl)]
        out.append(f"| {name} | {' | '.join(cells)} |")
    out += ["", "| claim | | difference ± error | replicates | verdict |", "| --- | --- | --- | --- | --- |"]
    for claim in judged:
        shown = [claim.low] + ([claim.high] if claim.high else [])
        pooled = " to ".join(f"{claim.pooled(values)[0]:+.4f} ± {claim.pooled(values)[1]:.4f}" for values in shown)
        each = ", ".join(f"{float(one[0]):+.4f}" for one in claim.low)
        out.append(f"| {claim.name} | {claim.words} | {pooled} | {each} | {claim.verdict()} |")
    out += ["", "| geometry, blocks | |", "| --- | ---: |"]
    out += [f"| {name} | {value:.3f} |" for name, value in found.geometry.items()]
    out += ["", "| loss of plain answers, nats per token | |", "| --- | ---: |"]
    out += [f"| {name} | {_with_error(resampled(values))} |" for name, values in found.loss.items()]
    return "\n".join(out).replace("-0.", "−0.")


def _with_error(values: Floats) -> str:
    return f"{float(values[0]):.3f} ± {float(values[1:].std(ddof=1)):.3f}"


def draw(found: Measured, place: Path) -> None:
    """Trajectories thin, lines from SFT to the merges thick, in the plane of KL and reward."""
    from gemma2.posttrain.reports.plots.figures import HUES, INK, new_figure, styled, write_figure

    means = {key: (float(found.kl[key].mean()), float(found.reward[key].mean())) for key in found.kl}
    with styled():
        figure, (axis,) = new_figure(6.4, 4.4)
        for number, run in enumerate(("rl-1", "rl-2", "rl-3", "rl-4", "rl-5")):
            stops = sorted(key for key in means if isinstance(key, tuple) and key[0] == run and key[1] > 0)
            keys = [("slerp-a", 0.0), *stops, run]
            xs, ys = zip(*(means[key] for key in keys), strict=True)
            label = {0: "RL runs, 32 steps", 4: "RL run, 128 steps"}.get(number)
            axis.plot(xs, ys, "--" if run == "rl-5" else "-", color=INK, lw=0.9, marker=".", ms=4, label=label)
        for (merge, label), colour in zip(
            {"slerp-a": "line to SLERP, a", "slerp-b": "line to SLERP, b", "slerp-2": "line, iteration 2"}.items(),
            HUES,
            strict=False,
        ):
            keys = sorted(key for key in means if isinstance(key, tuple) and key[0] == merge)
            xs, ys = zip(*(means[key] for key in keys), strict=True)
            errors = [float(resampled(found.reward[key])[1:].std(ddof=1)) for key in keys]
            axis.errorbar(xs, ys, errors, color=colour, marker="o", ms=4, lw=1.6, capsize=2, label=label)
        axis.set_xlabel("KL to the SFT policy (nats per sequence)")
        axis.set_ylabel("reward on held-out prompts")
        axis.legend(frameon=False, fontsize=8.5, loc="lower right")
        for suffix in (".png", ".svg"):
            write_figure(figure, place.with_suffix(suffix))


def answers(directory: Path, names: Sequence[str]) -> str:
    """Greedy answers by plain transformers to the first held-out prompts, which nobody chose."""
    rows = (directory / "words-held.jsonl").read_text(encoding="utf-8").splitlines()[:SHOWN]
    out = [f"| prompt | {' | '.join(names)} |", f"| --- {'| --- ' * len(names)}|"]
    for row in rows:
        prompt = json.loads(row)["prompt"]
        cells = [answer(directory / name, prompt, 28).replace("|", "/") for name in names]
        out.append(f"| {prompt} | {' | '.join(cells)} |")
    return "\n".join(out)


def write_values(found: Measured, place: Path) -> None:
    """The values per prompt, four digits."""
    kept = {
        kind: {_text(key): [round(float(value), 4) for value in values] for key, values in getattr(found, kind).items()}
        for kind in ("reward", "kl", "loss")
    }
    place.write_text(json.dumps({**kept, "geometry": found.geometry}) + "\n", encoding="utf-8")


def _text(key: object) -> str:
    return key if isinstance(key, str) else f"{key[0]} {key[1]}"  # type: ignore[index]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real-warp"))
    parser.add_argument("--gsm8k", type=Path, help="train.jsonl of GSM8K, for the plain questions of C7")
    parser.add_argument("--jobs", type=int, default=2, help="commands at once, with a share of the cores each")
    parser.add_argument("--rehearsal", action="store_true", help="two steps a run, 8 prompts: the path, no claim")
    options = parser.parse_args()
    size, directory = REHEARSAL if options.rehearsal else Size(), options.out
    directory.mkdir(parents=True, exist_ok=True)
    prepare(directory, size, options.gsm8k)
    chain = [Step("convert", f"convert {shlex.quote(str(gguf_file()))}", "base", resumable=False), *steps(size)]
    show_records(perform_all(chain, directory, options.jobs))
    reward, kl = read_fronts(directory)
    names = ["base", "sft", "rl-1", "rl-2", "rl-3", "rl-4", "slerp-a", "slerp-b", "liti-a", "liti-b"]
    found = Measured(reward, kl, losses(directory, names), geometry(directory))
    write_values(found, directory / "values.json")
    text = tables(found, claims(found))
    text += "\n\n" + answers(directory, ("base", "sft", "rl-1", "slerp-a", "liti-a"))
    draw(found, directory / "real-warp")
    (directory / "real-warp.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
